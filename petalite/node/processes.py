"""Nodes as child processes: started with `python -m petalite.node`, waited for until they print their
address.

For the demo, benchmarks and tests. A child's output is kept, so that one that fails can say why.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from petalite.errors import PetaliteError
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr

_ADDRESS = re.compile(r"^  address  (\S+)$")  # as `show_addresses` prints them
START_S = 60.0
STOP_S = 15.0
KEPT_LINES = 200

Wrap = Callable[[list[str]], list[str]]


class NodeProcess:
    """A context manager: leaving it stops the node with SIGTERM, or SIGKILL if it does not listen."""

    def __init__(
        self, *arguments: str, environment: dict[str, str] | None = None, wrap: Wrap | None = None
    ) -> None:
        """`wrap` makes another command line of the node's, say to run it elsewhere."""
        self.arguments = arguments
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._ready = threading.Event()
        self._address: Multiaddr | None = None
        self._started_s = time.monotonic()
        self.ready_s: float | None = None  # from start to the printed address
        command = [sys.executable, "-m", "petalite.node", *arguments]
        self._process = subprocess.Popen(
            command if wrap is None else wrap(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",  # whatever it says, what comes after is read
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            match = _ADDRESS.match(line.rstrip())
            if match and self._address is None:
                self._address = Multiaddr.parse(match[1])
                self.ready_s = time.monotonic() - self._started_s
                self._ready.set()
        self._ready.set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def address(self) -> Multiaddr:
        """Where it listens; waits until it says so. Raises PetaliteError with what it said instead."""
        if not self._ready.wait(START_S) or self._address is None:
            self.kill()
            command = " ".join(self.arguments)
            raise PetaliteError(f"`petalite {command}` did not come up; it printed:\n{self.output}")
        return self._address

    @property
    def peer_id(self) -> PeerId:
        peer_id = self.address.peer_id
        assert peer_id is not None, "a node prints its own id"
        return peer_id

    def kill(self) -> None:
        """SIGKILL: it has no time to say goodbye."""
        self._process.kill()
        self._process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop, and wait; its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join()
        return self._process.returncode

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.stop()


def bootstrap_node() -> NodeProcess:
    return NodeProcess("bootstrap", "--listen", "/ip4/127.0.0.1/tcp/0")


def serve_node(
    model: str,
    blocks: str,
    peers: Sequence[Multiaddr],
    *more: str,
    listen: str = "/ip4/127.0.0.1/tcp/0",
    wrap: Wrap | None = None,
) -> NodeProcess:
    """A server of `blocks`, one thread, joined through `peers`; without peers the first of a new swarm."""
    joining = [part for peer in peers for part in ("--peers", str(peer))] or ["--new-swarm"]
    command = ("serve", model, "--blocks", blocks, *joining, "--listen", listen, "--threads", "1", *more)
    return NodeProcess(*command, wrap=wrap)
