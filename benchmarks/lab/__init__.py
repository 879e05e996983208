"""Hosts on one Linux machine, joined by a network with set delay, jitter, rate, queue and loss."""

from benchmarks.lab.core import HostSpec
from benchmarks.lab.lab import Lab, LabUnavailable

__all__ = ["HostSpec", "Lab", "LabUnavailable"]
