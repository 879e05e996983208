"""Reading tensors in pieces and ahead: what comes, in what order, errors in their place, and which bytes a
file is asked for.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model import reading
from petalite.model.reading import AHEAD, Stream, Wanted
from petalite.model.system import SECTOR, in_large_pages, open_direct
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
                memory.add(piece.rows.untyped_storage().data_ptr())
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


@pytest.mark.parametrize("ahead", [0, AHEAD])
def test_what_is_left_of_an_owner_is_not_read(
    path: Path, tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails may take seconds for each read."""
    read: list[int] = []
    plain = reading._File.read

    def recorded(file: reading._File, start: int, memory: Tensor, nbytes: int) -> None:
        read.append(start)
        plain(file, start, memory, nbytes)

    monkeypatch.setattr(reading._File, "read", recorded)
    absent = [Wanted("absent", each.name, tmp_path / "absent", each.info) for each in wanted(path)]
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes())
    items = [*absent, *wanted(short, "short"), *wanted(path, "whole", ("vector",))]
    os.truncate(short, 1000)
    with Stream(items, ahead) as stream:
        for owner in ("absent", "short"):
            with pytest.raises(InvalidCheckpoint):
                stream.tensor("long")
            stream.skip(owner)
        assert torch.equal(stream.tensor("vector"), TENSORS["vector"])
    assert len(read) == 2


@pytest.fixture(
    params=["direct", "cached", "refused", "refused later", "in bits", "not told", "no direct reads"]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes come: past the page cache where the disk here allows it, else by way of it."""
    way, plain, calls = str(request.param), getattr(os, "preadv", None), itertools.count()

    def refuse(*args: object) -> int:
        raise OSError(errno.EINVAL, "refused")

    def read(descriptor: int, views: list[memoryview], start: int) -> int:
        assert plain is not None
        if way == "refused later" and next(calls) % 2:
            refuse()
        n_bytes: int = plain(descriptor, [view[: 3 * 512] for view in views], start)
        return n_bytes

    if way == "no direct reads":
        monkeypatch.setattr(reading, "open_direct", lambda path: None)
    elif way == "refused":  # at the first read, as some file systems do
        monkeypatch.setattr(os, "preadv", refuse, raising=False)
    elif way in ("refused later", "in bits"):
        monkeypatch.setattr(os, "preadv", read, raising=False)
    cached = {"cached": True, "not told": None}.get(way, False)
    monkeypatch.setattr(reading, "is_cached", lambda *args: cached)
    return way


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("place", [None, 0, 64])
@pytest.mark.parametrize("shift", [0, 1, 4096])
def test_bytes_are_the_same_whichever_way_they_come(tmp_path: Path, shift: int, place: int | None) -> None:
    """Also of tensors that begin at odd places of a file, and where they go in memory."""
    data = torch.arange(4_000_000, dtype=torch.int32)
    whole = bytes(shift) + data.numpy().tobytes()
    (tmp_path / "x").write_bytes(whole)
    cuts = [0, 3_500_000, 3_500_003, 3_501_000, 3_999_999, 4_000_000]
    tensors = []
    for at, end in itertools.pairwise(cuts):
        info = TensorInfo("I32", (end - at,), shift + 4 * at, shift + 4 * end)
        memory = None if place is None else in_large_pages(info.nbytes + place)[place:].view(torch.int32)
        tensors.append(Wanted("it", str(at), tmp_path / "x", info, memory))
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


def direct(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which bytes of what is not in the cache are asked for past it."""
    monkeypatch.setattr(reading, "is_cached", lambda *args: False)
    if (descriptor := open_direct(path)) is None:
        pytest.skip("the disk here takes no direct reads")
    os.close(descriptor)
    asked: list[int] = []
    plain = os.preadv

    def read(descriptor: int, views: list[memoryview], start: int) -> int:
        asked.append(start)
        return plain(descriptor, views, start)

    monkeypatch.setattr(os, "preadv", read)
    return asked


def test_a_slow_disk_is_read_by_way_of_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keeps its pages for the next start."""
    asked = direct(path, monkeypatch)
    monkeypatch.setattr(reading, "_TRIED_BYTES", 3 << 20)
    monkeypatch.setattr(reading, "_SLOW_BYTES_S", 1e30)
    with Stream(wanted(path, names=("long",))) as stream:
        assert torch.equal(stream.tensor("long"), TENSORS["long"])
    assert len(asked) == 2


def test_what_goes_to_its_place_is_read_there_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it begins a sector of the file and of memory: all of it but a last part of one."""
    data = torch.randint(0, 256, (20_000_001,), dtype=torch.uint8)
    (tmp_path / "x").write_bytes(bytes(SECTOR) + data.numpy().tobytes())
    asked = direct(tmp_path / "x", monkeypatch)
    for place, is_direct in ((0, True), (64, False)):
        asked.clear()
        memory = in_large_pages(len(data) + place)[place:]
        info = TensorInfo("U8", (len(data),), SECTOR, SECTOR + len(data))
        with Stream([Wanted("it", "x", tmp_path / "x", info, memory)]) as stream:
            assert torch.equal(stream.tensor("x"), data)
        assert bool(asked) == is_direct


def test_files_are_closed_when_nobody_reads_them_any_more(path: Path, tmp_path: Path) -> None:
    """More than are kept open, each of which has pieces under way when others are opened."""
    copies = [tmp_path / f"{number}.safetensors" for number in range(40)]
    for copy in copies:
        copy.hardlink_to(path)
    with Stream(itertools.chain.from_iterable(wanted(copy, copy) for copy in copies), AHEAD) as stream:
        for _ in copies:
            assert all(torch.equal(stream.tensor(name), TENSORS[name]) for name in TENSORS)
    assert not opened() & set(map(str, copies))


def opened() -> set[str]:
    """The files that this process has open, as far as the system tells."""
    links = Path("/proc/self/fd")
    return {os.path.realpath(link) for link in links.iterdir()} if links.exists() else set()


def test_files_are_closed_also_while_somebody_holds_the_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    info = TensorInfo("U8", (2000,), 0, 2000)
    with (
        pytest.raises(InvalidCheckpoint) as caught,
        Stream([Wanted("it", "x", tmp_path / "x", info)]) as stream,
    ):
        stream.tensor("x")
    assert caught.value.__traceback__ is not None and str(tmp_path / "x") not in opened()


def test_a_file_that_is_not_there(tmp_path: Path, path: Path) -> None:
    (info,) = (each.info for each in wanted(path, names=("number",)))
    absent = [Wanted("it", "number", tmp_path / "absent", info)]
    with Stream(absent) as stream, pytest.raises(InvalidCheckpoint, match=r"cannot read .*absent"):
        stream.tensor("number")


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the kernel is told: what to do, of which bytes."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the kernel takes no advice")
    found: list[tuple[int, int, int]] = []

    def advise(descriptor: int, start: int, length: int, what: int) -> None:
        found.append((what, start, start + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def test_nothing_but_what_is_wanted_is_asked_for(
    path: Path, advice: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel does not read on by itself; all is announced, in small steps, before it is read."""
    monkeypatch.setattr(reading, "open_direct", lambda path: None)
    names = ("vector", "long", "number")  # not as they are stored
    infos = [each.info for each in wanted(path, names=names)]
    with Stream(wanted(path, names=names)) as stream:
        stream.peek()
        first, *asked = advice
        for name in names:
            stream.tensor(name)
    assert first == (os.POSIX_FADV_RANDOM, 0, 0) and len(advice) == 1 + len(asked)
    assert all(what == os.POSIX_FADV_WILLNEED and end - start <= 1 << 20 for what, start, end in asked)
    for info in infos:
        inside = [(start, end) for _, start, end in asked if info.start <= start < info.end]
        assert inside[0][0] == info.start and inside[-1][1] == info.end
        assert all(before[1] == after[0] for before, after in itertools.pairwise(inside))
    assert sum(end - start for _, start, end in asked) == sum(info.nbytes for info in infos)


def test_what_comes_past_the_cache_is_not_announced(
    path: Path, advice: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct(path, monkeypatch)
    with Stream(wanted(path)) as stream:
        for name in TENSORS:
            assert torch.equal(stream.tensor(name), TENSORS[name])
    assert {what for what, _, _ in advice} == {os.POSIX_FADV_RANDOM}
