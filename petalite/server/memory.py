"""How much memory there is on a device, and how many blocks fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from petalite.errors import InvalidArgument
from petalite.model.block import block_bytes
from petalite.model.checkpoint import Checkpoint
from petalite.model.loading import block_kind
from petalite.swarm.spans import Span

AUTO, CPU, CUDA, MPS = DEVICES = ("auto", "cpu", "cuda", "mps")


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first of cuda, mps and cpu that is there. Raises InvalidArgument for one that is not."""
    if wanted not in DEVICES:
        raise InvalidArgument(f"device {wanted!r} is not known; choose one of {', '.join(DEVICES)}")
    there = {CUDA: torch.cuda.is_available(), MPS: torch.backends.mps.is_available(), CPU: True}
    if wanted == AUTO:
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[wanted]:
        has = ", ".join(name for name, is_there in there.items() if is_there)
        raise InvalidArgument(f"torch finds no {wanted} device here; this machine has {has}")
    return torch.device(wanted)


def available_bytes(device: torch.device) -> int:
    """Memory to be had without swapping: the device's free memory; of a CPU the kernel's own estimate, or
    half of all there is.
    """
    if device.type == CUDA:
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if device.type == MPS:
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What blocks and caches may take."""

    cache_tokens: int = 65536  # room for keys and values of so many tokens, all sessions together
    limit_bytes: int | None = None  # weights and cache together; None: half of what is free


def served_block_bytes(checkpoint: Checkpoint, dtype: torch.dtype, quant: str, cache_tokens: int) -> int:
    """What serving one block takes: its weights, and keys and values of `cache_tokens`."""
    config = checkpoint.config
    attention = config.attention
    token_bytes = 2 * attention.n_kv_heads * attention.head_dim * dtype.itemsize
    return block_bytes(block_kind(checkpoint), config, dtype, quant) + cache_tokens * token_bytes


def blocks_that_fit(checkpoint: Checkpoint, block_size: int, memory: MemorySettings, free_bytes: int) -> int:
    """How many blocks of `block_size` bytes to serve. Raises InvalidArgument if not even one fits."""
    limit = free_bytes // 2 if memory.limit_bytes is None else memory.limit_bytes
    if limit < block_size:
        raise InvalidArgument(
            f"one block of {checkpoint.name} with room for {memory.cache_tokens} tokens needs "
            f"{block_size >> 20} MiB, {limit >> 20} MiB may be used; free some or give more with --memory, "
            f"take a smaller --cache-tokens or --quant, or choose blocks yourself with --blocks"
        )
    return min(limit // block_size, held_blocks(checkpoint))


def held_blocks(checkpoint: Checkpoint) -> int:
    """How many blocks the checkpoint can be served of."""
    held = checkpoint.quantized
    return checkpoint.config.n_blocks if held is None else held.end - held.start


def check_fits(span: Span, checkpoint: Checkpoint, block_size: int, memory: MemorySettings) -> None:
    """Raises InvalidArgument if the blocks that were asked for take more than was allowed."""
    if memory.limit_bytes is not None and len(span) * block_size > memory.limit_bytes:
        raise InvalidArgument(
            f"blocks {span} of {checkpoint.name} with room for {memory.cache_tokens} tokens need "
            f"{len(span) * block_size >> 20} MiB, --memory allows {memory.limit_bytes >> 20} MiB"
        )
