"""How many blocks fit, against the bytes that loaded blocks and caches really take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.loading import chosen_format, quantize_folder
from petalite.model.span import load_span
from petalite.server import loaded
from petalite.server.memory import (
    MemorySettings,
    available_bytes,
    blocks_that_fit,
    check_fits,
    choose_device,
    served_block_bytes,
)
from petalite.swarm.spans import Span
from tests.helpers.checkpoints import tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4))


async def test_a_device_that_is_full(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has …")

    monkeypatch.setattr(loaded, "load_span", full)
    thread = ComputeThread()
    loader = loaded.BlockLoader(checkpoint, loaded.ComputeSettings(device="cpu"), MemorySettings(), thread)
    with pytest.raises(InvalidArgument, match=r"blocks 0:2 of .* fewer with --blocks.*: CUDA out of memory$"):
        await loader.load(Span(0, 2))
    thread.close()


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_formula_is_what_blocks_and_cache_take(checkpoint: Checkpoint, quant: str) -> None:
    span = load_span(checkpoint, 1, 3, quant=quant)
    expected = (span.nbytes + 100 * span.token_bytes()) // 2
    predicted = served_block_bytes(checkpoint, torch.float32, quant, 100)
    # Native panels are of 16 rows, and hold int8's scales twice: hundreds of bytes, of a tiny model's a part.
    assert predicted <= expected <= 1.05 * predicted


def test_as_many_as_half_of_the_free_memory_holds(checkpoint: Checkpoint) -> None:
    assert blocks_that_fit(checkpoint, 100, MemorySettings(), 650) == 3
    assert blocks_that_fit(checkpoint, 100, MemorySettings(), 10_000) == 4
    assert blocks_that_fit(checkpoint, 100, MemorySettings(limit_bytes=250), 10_000) == 2
    with pytest.raises(InvalidArgument, match="needs"):
        blocks_that_fit(checkpoint, 100, MemorySettings(), 199)


def test_chosen_blocks_must_fit_what_was_allowed(checkpoint: Checkpoint) -> None:
    check_fits(Span(0, 4), checkpoint, 100, MemorySettings())
    check_fits(Span(0, 2), checkpoint, 100, MemorySettings(limit_bytes=200))
    with pytest.raises(InvalidArgument, match="--memory allows"):
        check_fits(Span(0, 3), checkpoint, 100 << 20, MemorySettings(limit_bytes=200 << 20))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(InvalidArgument, match="no cuda device"):
        choose_device("cuda")
    with pytest.raises(InvalidArgument, match="no mps device here; this machine has cpu"):
        choose_device("mps")
    with pytest.raises(InvalidArgument, match="auto, cpu, cuda, mps"):
        choose_device("tpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("mps") == torch.device("mps")
    assert choose_device("cpu") == torch.device("cpu")


def test_free_memory_of_a_device_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 8 << 30))
    assert available_bytes(torch.device("cuda")) == 5 << 30
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 << 30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1 << 30)
    assert available_bytes(torch.device("mps")) == 9 << 30
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(torch.device("cpu")) <= total


def test_a_folder_of_quantized_blocks_is_served_of_those(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quantize_folder(checkpoint, 1, 3, "int8", tmp_path / "int8")
    held = Checkpoint.open(tmp_path / "int8")
    assert blocks_that_fit(held, 100, MemorySettings(), 10_000) == 2
    dense = served_block_bytes(checkpoint, torch.float32, "int8", 10)
    assert served_block_bytes(held, torch.float32, chosen_format(held, None), 10) == dense
