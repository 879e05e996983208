"""One thread that does a process's tensor work, so that its event loop never waits for arithmetic.

Work runs in the order it was asked for, one piece at a time; what only this thread touches needs no lock. One
thread also means one pool of intra-op threads: torch keeps a pool per calling thread, and two would fight for
the same cores. Knows nothing of blocks or sessions.

An executor of `concurrent.futures` does the same through two futures, a lock and a condition more, which a
decode step of a few milliseconds feels.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

import torch

from petalite.errors import ShuttingDown
from petalite.kernels.finite import all_finite

# To look through so few bytes takes less than a tensor operation does between two passes over a model's
# weights, whose caches are cold.
FEW_BYTES = 1 << 16
WIDE_FLOATS = (torch.float32, torch.bfloat16)  # with eight bits of exponent, the first seven in the last byte

P = ParamSpec("P")
R = TypeVar("R")
_Work = tuple[asyncio.Future[Any], Callable[[], Any]]


class ComputeThread:
    """Runs functions on its thread for coroutines of any loop. Close it when its owner goes."""

    def __init__(self, name: str = "petalite-compute") -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self.closed = False
        self._asked, self._ended = 0, _Count()
        thread = threading.Thread(target=_serve, args=(self._queue, self._ended), name=name, daemon=True)
        _serving[thread] = self._queue
        thread.start()

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Queue `function` and await its result. Cancelling the wait also unqueues it, if it has not begun.

        Raises ShuttingDown once the thread is closed.
        """
        if self.closed:
            raise ShuttingDown("what computed this was closed")
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._asked += 1
        self._queue.put((future, partial(function, *args, **kwargs)))
        return future

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits: what only this thread touches is the caller's, if it is the one that
        asks for all work, until it asks for more."""
        return not self.closed and self._asked == self._ended.value

    def close(self) -> None:
        """Refuse new work, cancel what waits, and let go; what runs now finishes by itself."""
        self.closed = True
        with suppress(Empty):
            while True:
                if (work := self._queue.get_nowait()) is not None:
                    _tell(work[0], _cancel)
        self._queue.put(None)


def use_threads(most: int | None) -> None:
    """Let the tensor work of this thread take `most` threads; None: as many as torch would.

    Never more than the cores that this process may run on: a thread without a core holds up all others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(most or torch.get_num_threads(), cores))


_LAST_S, _SLICES = 5.0, 50  # for what runs when the process ends; to be stopped meanwhile costs but a slice
_serving: dict[threading.Thread, SimpleQueue[_Work | None]] = {}


@atexit.register
def _end_all() -> None:
    """A thread that is in C++ code when the interpreter goes away takes the process down with SIGABRT."""
    for thread, queue in list(_serving.items()):
        queue.put(None)
        for _ in range(_SLICES):
            thread.join(_LAST_S / _SLICES)


@dataclass(slots=True)
class _Count:
    """Of one thread's doing, for others to read."""

    value: int = 0


def _serve(queue: SimpleQueue[_Work | None], ended: _Count) -> None:
    try:
        _work_through(queue, ended)
    finally:
        del _serving[threading.current_thread()]


def _work_through(queue: SimpleQueue[_Work | None], ended: _Count) -> None:
    while (work := queue.get()) is not None:
        future, function = work
        settle = None
        if not future.cancelled():
            try:
                settle = partial(_set_result, result=function())
            except BaseException as error:
                settle = partial(_set_exception, error=error)
        ended.value += 1
        if settle is not None:
            _tell(future, settle)
        del work, future, function  # what was computed with lives no longer than it must


def _tell(future: asyncio.Future[Any], settle: Callable[[asyncio.Future[Any]], None]) -> None:
    with suppress(RuntimeError):  # its loop is closed: nobody waits
        future.get_loop().call_soon_threadsafe(settle, future)


def _set_result(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _cancel(future: asyncio.Future[Any]) -> None:
    future.cancel()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf."""
    if (
        tensor.nbytes <= FEW_BYTES
        and tensor.dtype in WIDE_FLOATS
        and tensor.is_cpu
        and tensor.is_contiguous()
    ):
        data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        if plainly_finite(data.raw, tensor.itemsize):
            return True
    return all_finite(tensor)


def plainly_finite(data: bytes, itemsize: int) -> bool:
    """Whether all of WIDE_FLOATS are below 2^127, by their last bytes: the sign and most of the exponent."""
    last = data[itemsize - 1 :: itemsize]
    return 0x7F not in last and 0xFF not in last
