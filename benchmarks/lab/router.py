"""The lab's router, a process of its own: reads packets from the hosts' TUN devices, and writes each where
and when `core.Network` says.

Told what to do by lines of JSON on its standard input: first the hosts and the seed, then commands, each of
which is answered with a line; it ends when its input does. The devices come as inherited descriptors.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import sys
from time import monotonic, sleep
from typing import Any

from benchmarks.lab.core import HostSpec, Network

_PACKET_BYTES = 2048  # more than the devices' MTU
_READS_PER_TURN = 32  # from one device; then what is due is written
_BUSY_PACKETS = 16  # with so many on their way
_EARLY_S = 0.0002  # to be woken takes about so long; what is left of it is waited for awake
_BATCH_S = 0.0002  # the router looks only so often, since to wake for each costs more than to pass it on


def main() -> None:
    descriptors = [int(argument) for argument in sys.argv[1:]]
    setup = _heard()
    network = Network([HostSpec(**_figures(host)) for host in setup["hosts"]], setup["seed"])
    print("null", flush=True)
    _hurry()
    with contextlib.suppress(EOFError):
        _route(network, descriptors)


def _hurry() -> None:
    """Run before all else: what the router is late, the network would seem slow."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _route(network: Network, descriptors: list[int]) -> None:
    hosts = {descriptor: host for host, descriptor in enumerate(descriptors)}
    watched = [0, *descriptors]
    while True:
        for host, packet in network.advance(monotonic()):
            with contextlib.suppress(OSError):  # a host that is down, or has no memory for it, loses it
                os.write(descriptors[host], packet)
        if len(network) > _BUSY_PACKETS:
            sleep(_BATCH_S)
        # select, for its timeout in microseconds; epoll's is in milliseconds.
        wait_s = None if not len(network) else max(0.0, network.next_at - monotonic() - _EARLY_S)
        for descriptor in select.select(watched, (), (), wait_s)[0]:
            if not descriptor:
                _obey(network)
            else:
                _read(network, hosts[descriptor], descriptor)


def _read(network: Network, host: int, descriptor: int) -> None:
    now = monotonic()
    for _ in range(_READS_PER_TURN):
        try:
            packet = os.read(descriptor, _PACKET_BYTES)
        except OSError:
            return
        network.send(host, packet, now)


def _obey(network: Network) -> None:
    """One command: what to `do`, the host, and what it needs."""
    command = _heard()
    host, answer = command["host"], None
    try:
        match command["do"]:
            case "set":
                network.change(host, **_figures(command["changes"]))
            case "cut":
                network.cut(host)
            case "heal":
                network.heal(host)
            case "counts":
                answer = network.counts(host)
    except (TypeError, ValueError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)


def _heard() -> dict[str, Any]:
    """The next line, and no byte of the one behind it: `select` would not know of what a buffer holds."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise EOFError
        line += byte
    heard: dict[str, Any] = json.loads(line)
    return heard


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {name: math.inf if value is None else value for name, value in figures.items()}


if __name__ == "__main__":
    main()
