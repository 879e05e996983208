"""Memory that the lanes of one host share, so that a quiet connection holds none. Knows sizes only."""

from __future__ import annotations

import mmap
import sys
from time import monotonic

from petalite.net.frames import MAX_DATA_BYTES
from petalite.net.records import MAX_PLAINTEXT_BYTES, OVERHEAD_BYTES

RECEIVE_BYTES = 512 * 1024
SEND_BYTES = MAX_DATA_BYTES + 3 * (MAX_PLAINTEXT_BYTES + OVERHEAD_BYTES)  # a batch, and what it begins late
POOLED_BYTES = 256 * 1024  # buffers from this size on are pooled,
POOL_BYTES = 128 * 1024 * 1024  # so many bytes in all at most,
POOL_S = 10.0  # and so long after they were last taken


class Scratch:
    """A buffer to receive into, one to seal a batch into, and memory for large messages.

    The last is given out again when nobody refers to it any more. Fresh pages cost the kernel more than
    decryption costs us: 16 MiB of them take some 10 ms. What is given out may hold old bytes, so it is for
    those who fill all of it before anybody reads it; what is fresh takes up no memory before it is filled.
    """

    def __init__(self) -> None:
        self.receive = memoryview(mmap.mmap(-1, RECEIVE_BYTES))
        self.send = memoryview(mmap.mmap(-1, SEND_BYTES))
        self._kept: list[tuple[mmap.mmap, float]] = []
        self._kept_bytes = 0

    def take(self, size: int) -> memoryview:
        """Writable memory of that size; a reference to the view, or to a slice of it, keeps it taken."""
        if size < POOLED_BYTES:
            return memoryview(bytearray(size))
        for index, (buffer, _) in enumerate(self._kept):
            if len(buffer) == size and sys.getrefcount(buffer) == 3:  # the list's, the loop's, the question's
                self._kept[index] = (buffer, monotonic())
                return memoryview(buffer)
        buffer = mmap.mmap(-1, size)
        if self._kept_bytes + size <= POOL_BYTES:
            self._kept_bytes += size
            self._kept.append((buffer, monotonic()))
        return memoryview(buffer)

    def trim(self, now: float) -> None:
        """Let go of what was not taken for a while."""
        self._kept = [(buffer, used_at) for buffer, used_at in self._kept if now - used_at < POOL_S]
        self._kept_bytes = sum(len(buffer) for buffer, _ in self._kept)
