"""What the kernel tells of a file's pages, and memory taken early."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from petalite.model.system import give_back, in_large_pages, is_cached, open_direct, take_pages


def test_pages_of_a_file_that_was_just_written_are_cached(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100_000))
    with path.open("rb") as file:
        found = is_cached(file.fileno(), 5000, 99_000)
        if found is None:
            pytest.skip("the kernel does not tell")
        assert found
        assert not is_cached(file.fileno(), 5000, 200_000)  # not all of it is there


def test_a_descriptor_that_is_none_is_not_known() -> None:
    assert is_cached(-1, 0, 4096) is None


def test_taking_pages_changes_nothing_in_them() -> None:
    for nbytes in (0, 100, 5000, 5_000_000):
        memory = torch.arange(nbytes + 3).to(torch.uint8)
        before = memory.clone()
        take_pages(memory[3:])
        assert torch.equal(memory, before)


def test_giving_pages_back_changes_nothing_beside_them() -> None:
    memory = torch.ones(100_000, dtype=torch.uint8)
    give_back(memory[1000:90_000])
    assert memory[:1000].all() and memory[90_000:].all()
    memory.fill_(2)
    assert (memory == 2).all()


def test_memory_in_large_pages_begins_one() -> None:
    for nbytes in (1, 5000, 2 << 20, (4 << 20) + 4096):
        memory = in_large_pages(nbytes)
        assert len(memory) == nbytes and memory.data_ptr() % (2 << 20) == 0
        assert not memory.any()
        memory.fill_(3)


def test_direct_reads_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert open_direct(tmp_path / "absent") is None
    (tmp_path / "x").write_bytes(b"x")
    if (descriptor := open_direct(tmp_path / "x")) is not None:
        os.close(descriptor)
