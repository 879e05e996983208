"""The lab itself: a network namespace with a TUN device per host, and the router between them.

Any program runs unchanged on such a host. Needs Linux, root, /dev/net/tun and iproute2; without them `Lab`
raises `LabUnavailable`, and who uses it says so and does without.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from benchmarks.lab.core import PREFIX_BITS, HostSpec, address_of

MTU = 1500
_DEVICE = "net0"  # inside the namespace
_QUEUE_PACKETS = 10_000  # between kernel and router, which reads at once
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NAMESPACES = Path("/run/netns")


class LabUnavailable(Exception):
    """This machine cannot be made into several; the text says what is missing."""


class Lab:
    """An async context manager. What still runs on its hosts when it is left is killed.

    async with Lab([HostSpec("near", delay_s=0.01), HostSpec("far", delay_s=0.04)]) as lab:
        process = await asyncio.create_subprocess_exec(*lab.command("near", ["ping", lab.address("far")]))
    """

    def __init__(self, hosts: Iterable[HostSpec], *, seed: int = 0) -> None:
        self._hosts = list(hosts)
        self._numbers = {host.name: number for number, host in enumerate(self._hosts)}
        if len(self._numbers) != len(self._hosts):
            raise ValueError("hosts of a lab have different names")
        self._seed = seed
        self._router: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        _demand_means()
        async with contextlib.AsyncExitStack() as stack:
            for stale in _stale_namespaces():
                await _ip("netns", "del", stale)
            descriptors = [await self._add_host(number, stack) for number in range(len(self._hosts))]
            self._router = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "benchmarks.lab.router",
                *map(str, descriptors),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=descriptors,
                cwd=Path(__file__).parents[2],
            )
            stack.push_async_callback(self._stop_router, self._router)
            await self._tell({"hosts": [_plain(asdict(host)) for host in self._hosts], "seed": self._seed})
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def address(self, name: str) -> str:
        """The host's IPv4 address."""
        return address_of(self._numbers[name])

    def command(self, name: str, arguments: Sequence[str]) -> list[str]:
        """The command line that runs another one on the host."""
        return ["ip", "netns", "exec", _namespace(self._numbers[name]), *arguments]

    async def set(self, name: str, **changes: float) -> None:
        """Change figures of the host's link: those of `HostSpec`."""
        await self._order("set", name, changes=_plain(changes))

    async def cut(self, name: str) -> None:
        """Pull the host's plug: nothing passes any more, and nobody is told."""
        await self._order("cut", name)

    async def heal(self, name: str) -> None:
        await self._order("heal", name)

    async def counts(self, name: str) -> dict[str, dict[str, int]]:
        """`core.Counts` of what the host sent and received, as a dict."""
        counts: dict[str, dict[str, int]] = await self._order("counts", name)
        return counts

    async def _order(self, do: str, name: str, **more: Any) -> Any:
        return await self._tell({"do": do, "host": self._numbers[name], **more})

    async def _tell(self, line: dict[str, Any]) -> Any:
        router = self._router
        assert router is not None and router.stdin is not None and router.stdout is not None
        async with self._turn:
            router.stdin.write(json.dumps(line).encode() + b"\n")
            answer = json.loads(await router.stdout.readline() or '{"error": "the router is gone"}')
        if isinstance(answer, dict) and "error" in answer:
            raise ValueError(answer["error"])
        return answer

    async def _add_host(self, number: int, stack: contextlib.AsyncExitStack) -> int:
        """A namespace whose one device this process holds the other end of; that end's descriptor."""
        namespace, device = _namespace(number), f"lab{os.getpid()}-{number}"[-15:]
        try:
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
            _name_device(descriptor, device)
        except OSError as error:
            raise LabUnavailable(f"no TUN device can be made: {error.strerror}") from error
        await _ip("netns", "add", namespace)
        stack.push_async_callback(_remove_namespace, namespace)
        await _ip("link", "set", device, "netns", namespace, "name", _DEVICE)
        inside = ("-n", namespace)
        await _ip(*inside, "addr", "add", f"{address_of(number)}/{PREFIX_BITS}", "dev", _DEVICE)
        await _ip(*inside, "link", "set", "lo", "up")
        await _ip(*inside, "link", "set", _DEVICE, "mtu", str(MTU), "txqueuelen", str(_QUEUE_PACKETS), "up")
        return descriptor

    async def _stop_router(self, router: asyncio.subprocess.Process) -> None:
        assert router.stdin is not None
        router.stdin.close()
        await router.wait()


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """As JSON has them, which knows no infinity."""
    return {name: None if value == math.inf else value for name, value in figures.items()}


def _demand_means() -> None:
    if sys.platform != "linux":
        raise LabUnavailable("the lab needs Linux's network namespaces")
    if os.geteuid() != 0:
        raise LabUnavailable("the lab makes network namespaces, which takes root")
    if shutil.which("ip") is None:
        raise LabUnavailable("the lab needs the command ip: install iproute2")
    if not Path("/dev/net/tun").exists():
        raise LabUnavailable("the lab needs /dev/net/tun: modprobe tun, or give the container that device")


def _namespace(number: int) -> str:
    return f"petalite-lab-{os.getpid()}-{number}"


def _stale_namespaces() -> list[str]:
    """Those of labs whose process is dead."""
    names = [path.name for path in _NAMESPACES.glob("petalite-lab-*")] if _NAMESPACES.exists() else []
    return [name for name in names if not Path(f"/proc/{name.split('-')[2]}").exists()]


def _name_device(descriptor: int, device: str) -> None:
    import fcntl  # which only such a system has

    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))


async def _ip(*arguments: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        "ip", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, complaint = await process.communicate()
    if process.returncode:
        raise LabUnavailable(f"ip {' '.join(arguments)}: {complaint.decode(errors='replace').strip()}")
    return output


async def _remove_namespace(namespace: str) -> None:
    for line in (await _ip("netns", "pids", namespace)).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line), signal.SIGKILL)
    await _ip("netns", "del", namespace)
