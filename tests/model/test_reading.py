"""Reading tensors in pieces and ahead: what comes, in what order, errors in their place, and which bytes a
file is asked for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model.reading import AHEAD, Stream, Wanted
from petalite.model.tensorfile import read_header

TENSORS: dict[str, Tensor] = {
    "long": torch.arange(5_000_000, dtype=torch.int32).view(-1, 500),
    "wide": torch.arange(40 * 70_000, dtype=torch.int32).to(torch.int16).view(40, 70_000),
    "vector": torch.randn(1000).bfloat16(),
    "number": torch.tensor(3.5),
    "no rows": torch.empty(0, 4),
    "no columns": torch.empty(4, 0, dtype=torch.int8),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def wanted(path: Path, owner: object = "it", names: tuple[str, ...] = tuple(TENSORS)) -> Iterator[Wanted]:
    header = read_header(path)
    return (Wanted(owner, name, path, header[name]) for name in names)


@pytest.mark.parametrize("ahead", [0, 1, AHEAD])
def test_what_is_wanted_comes_in_order(path: Path, ahead: int) -> None:
    with Stream(wanted(path), ahead) as stream:
        for name in TENSORS:
            assert stream.owner() == "it"
            assert torch.equal(stream.tensor(name), TENSORS[name])
        with pytest.raises(AssertionError, match="no more"):
            stream.owner()


@pytest.mark.parametrize("ahead", [0, AHEAD])
def test_pieces_cover_a_tensor_once(path: Path, ahead: int) -> None:
    """Each is whole rows in a buffer of its own until the next is asked for; no buffer is larger than two
    pieces should be.
    """
    with Stream(wanted(path, names=("long", "wide")), ahead) as stream:
        for name in ("long", "wide"):
            end, memory = 0, set()
            for piece in stream.rows(name):
                assert piece.first == end
                end = piece.end
                assert torch.equal(piece.rows, TENSORS[name][piece.first : end])
                memory.add(piece.rows.data_ptr())
                assert piece.rows.nbytes <= 3 << 20
            assert end == len(TENSORS[name]) and len(memory) <= ahead + 1


def test_a_tensor_goes_where_it_is_wanted(path: Path) -> None:
    into = torch.empty_like(TENSORS["long"])
    (plain,) = wanted(path, names=("long",))
    with Stream([Wanted("it", "long", path, plain.info, into)], AHEAD) as stream:
        assert stream.tensor("long") is into
    assert torch.equal(into, TENSORS["long"])


def test_a_thread_reads_a_few_pieces_early_and_ends(path: Path) -> None:
    seen: list[str] = []

    def recorded() -> Iterator[Wanted]:
        for each in wanted(path):
            seen.append(threading.current_thread().name)
            yield each

    with Stream(recorded(), AHEAD) as stream:
        next(stream.rows("long"))
    assert all("petalite-reader" in name for name in seen)
    assert not [thread for thread in threading.enumerate() if "petalite-reader" in thread.name]


@pytest.mark.parametrize("ahead", [0, AHEAD])
def test_an_error_of_who_names_them_comes_in_its_place(path: Path, ahead: int) -> None:
    def failing() -> Iterator[Wanted]:
        yield from wanted(path, names=("vector", "number"))
        raise InvalidCheckpoint("the third")

    with Stream(failing(), ahead) as stream, pytest.raises(InvalidCheckpoint, match="the third"):
        for name in ("vector", "number", "long"):
            stream.tensor(name)


@pytest.mark.parametrize("ahead", [0, AHEAD])
def test_a_file_that_ends_early_spoils_its_owner_alone(path: Path, tmp_path: Path, ahead: int) -> None:
    """Its other tensors do not come; the next owner's do, also those of one that skips some."""
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes())
    names = ("vector", "long", "number")
    items = [*wanted(short, "first", names), *wanted(path, "second", names), *wanted(path, "third", names)]
    with short.open("r+b") as file:
        file.truncate(items[1].info.end - 5)
    with Stream(items, ahead) as stream:
        with pytest.raises(InvalidCheckpoint, match=r"short\.safetensors is truncated"):
            for name in names:
                stream.tensor(name)
        stream.skip("first")
        assert stream.owner() == "second"
        assert torch.equal(stream.tensor("vector"), TENSORS["vector"])
        stream.skip("second")
        assert [torch.equal(stream.tensor(name), TENSORS[name]) for name in names] == [True] * 3
        stream.skip("third")


def test_a_file_that_is_not_there(tmp_path: Path, path: Path) -> None:
    (info,) = (each.info for each in wanted(path, names=("number",)))
    absent = [Wanted("it", "number", tmp_path / "absent", info)]
    with Stream(absent) as stream, pytest.raises(InvalidCheckpoint, match=r"cannot read .*absent"):
        stream.tensor("number")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the kernel takes no advice")
def test_the_kernel_is_asked_for_these_bytes_and_no_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small steps, each before it is read, and told not to read on by itself."""
    asked: list[tuple[int, int]] = []
    random = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((start, start + length))
        else:
            random.append(advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    names = ("vector", "long")
    with Stream(wanted(path, names=names)) as stream:
        stream.owner()
        infos = [each.info for each in wanted(path, names=names)]
        assert max(end for _, end in asked) > infos[1].start + (8 << 20)
        for name in names:
            stream.tensor(name)
    assert random == [os.POSIX_FADV_RANDOM]
    assert max(end - start for start, end in asked) <= 1 << 20
    joined: list[tuple[int, int]] = []
    for start, end in asked:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    assert joined == [(info.start, info.end) for info in infos]
