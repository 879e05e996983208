"""Reading tensors in pieces and ahead: what comes, in what order, errors in their place, and which bytes a
file is asked for.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model import reading
from petalite.model.reading import AHEAD, Stream, Wanted
from petalite.model.tensorfile import TensorInfo, read_header

TENSORS: dict[str, Tensor] = {
    "long": torch.arange(3_000_000, dtype=torch.int32).view(-1, 500),
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
            assert stream.peek().owner == "it"
            assert torch.equal(stream.tensor(name), TENSORS[name])
        with pytest.raises(AssertionError, match="no more"):
            stream.peek()


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
        assert stream.peek().owner == "second"
        assert torch.equal(stream.tensor("vector"), TENSORS["vector"])
        stream.skip("second")
        assert [torch.equal(stream.tensor(name), TENSORS[name]) for name in names] == [True] * 3
        stream.skip("third")


@pytest.fixture(params=["direct", "cached", "refused", "no direct reads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes come: past the page cache where the disk here allows it, else by way of it."""
    if request.param == "no direct reads":
        monkeypatch.setattr(reading, "open_direct", lambda path: None)
    elif request.param == "refused":  # at the first read, as some file systems do

        def refuse(*args: object) -> int:
            raise OSError(errno.EINVAL, "refused")

        monkeypatch.setattr(os, "preadv", refuse, raising=False)
    monkeypatch.setattr(reading, "is_cached", lambda *args: request.param == "cached")
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_bytes_are_the_same_whichever_way_they_come(tmp_path: Path, shift: int) -> None:
    """Also of tensors that begin at odd places of a file."""
    data = torch.arange(5_000_000, dtype=torch.int32)
    whole = bytes(shift) + data.numpy().tobytes()
    (tmp_path / "x").write_bytes(whole)
    cuts = [0, 3, 1000, 1_200_000, 4_999_999, 5_000_000]
    tensors = [
        Wanted("it", str(at), tmp_path / "x", TensorInfo("I32", (end - at,), shift + 4 * at, shift + 4 * end))
        for at, end in itertools.pairwise(cuts)
    ]
    with Stream(tensors, AHEAD) as stream:
        for each, (at, end) in zip(tensors, itertools.pairwise(cuts), strict=True):
            assert torch.equal(stream.tensor(each.name), data[at:end])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("missing", [1, 5000])
def test_a_cut_off_file_is_an_error_whichever_way_it_is_read(tmp_path: Path, missing: int) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate((3 << 20) - missing)
    info = TensorInfo("U8", (3 << 20,), 0, 3 << 20)
    ended = (3 << 20) - missing
    message = f"x is truncated: it ends after byte {ended}"
    with (
        Stream([Wanted("it", "x", tmp_path / "x", info)], AHEAD) as stream,
        pytest.raises(InvalidCheckpoint, match=message),
    ):
        stream.tensor("x")


def test_a_slow_disk_is_read_by_way_of_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keeps its pages for the next start; so is what the cache has already."""
    monkeypatch.setattr(reading, "is_cached", lambda *args: False)
    monkeypatch.setattr(reading, "_TRIED_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "_SLOW_BYTES_S", 1e30)
    file = reading._File(path)
    if not file.is_direct:
        pytest.skip("the disk here takes no direct reads")
    file.read(0, 3 << 20, reading._Buffer())
    assert not file.is_direct


def test_files_are_closed_when_nobody_reads_them_any_more(path: Path, tmp_path: Path) -> None:
    """More than are kept open, each of which has pieces under way when others are opened."""
    copies = [tmp_path / f"{number}.safetensors" for number in range(40)]
    for copy in copies:
        copy.write_bytes(path.read_bytes())
    with Stream(itertools.chain.from_iterable(wanted(copy, copy) for copy in copies), AHEAD) as stream:
        for _ in copies:
            assert all(torch.equal(stream.tensor(name), TENSORS[name]) for name in TENSORS)
    if Path("/proc/self/fd").exists():
        opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
        assert not opened & set(map(str, copies))


def test_a_file_that_is_not_there(tmp_path: Path, path: Path) -> None:
    (info,) = (each.info for each in wanted(path, names=("number",)))
    absent = [Wanted("it", "number", tmp_path / "absent", info)]
    with Stream(absent) as stream, pytest.raises(InvalidCheckpoint, match=r"cannot read .*absent"):
        stream.tensor("number")


@dataclass
class Advice:
    """What the kernel is told: of which bytes, and whether to read on by itself."""

    asked: list[tuple[int, int]] = field(default_factory=list)
    reads_on: list[tuple[int, bool]] = field(default_factory=list)  # said when reading had come so far


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the kernel takes no advice")
    monkeypatch.setattr(reading, "open_direct", lambda path: None)
    found = Advice()

    def advise(descriptor: int, start: int, length: int, what: int) -> None:
        if what == os.POSIX_FADV_WILLNEED:
            found.asked.append((start, start + length))
        else:
            found.reads_on.append((os.lseek(descriptor, 0, os.SEEK_CUR), what == os.POSIX_FADV_NORMAL))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def test_of_what_is_wanted_in_parts_nothing_else_is_asked_for(path: Path, advice: Advice) -> None:
    """The kernel does not read on by itself; each part is announced, in small steps, before it is read."""
    names = ("vector", "long", "number")  # not as they are stored
    infos = [each.info for each in wanted(path, names=names)]
    with Stream(wanted(path, names=names)) as stream:
        stream.peek()
        assert max(end for _, end in advice.asked) > infos[1].start
        for name in names:
            stream.tensor(name)
    assert not any(on for _, on in advice.reads_on)
    assert max(end - start for start, end in advice.asked) <= 1 << 20
    for info in infos:
        inside = [(start, end) for start, end in advice.asked if info.start <= start < info.end]
        assert inside[0][0] == info.start and inside[-1][1] == info.end
        assert all(before[1] == after[0] for before, after in itertools.pairwise(inside))
    assert sum(end - start for start, end in advice.asked) == sum(info.nbytes for info in infos)


@pytest.mark.parametrize("rest", [0, 1 << 20], ids=["to the end of the file", "not to the end"])
def test_the_kernel_reads_on_along_what_is_wanted(tmp_path: Path, advice: Advice, rest: int) -> None:
    """It is stopped in time before bytes that are not."""
    half = 30 << 20
    with (tmp_path / "big").open("wb") as file:
        file.truncate(2 * half + rest)
    halves = [
        Wanted("it", name, tmp_path / "big", TensorInfo("U8", (half // 4096, 4096), at, at + half))
        for name, at in (("first", 0), ("second", half))
    ]
    with Stream(halves) as stream:
        assert not stream.tensor("first").any() and not stream.tensor("second").any()
    if rest:
        ((stopped, on),) = advice.reads_on
        assert not on and 2 * half - (20 << 20) <= stopped <= 2 * half - (16 << 20)
        assert max(end for _, end in advice.asked) == 2 * half
        assert all(start >= stopped for start, _ in advice.asked)
    else:
        assert not advice.reads_on and not advice.asked
