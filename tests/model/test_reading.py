"""Reading ahead: order, errors in their place, one at a time ahead; and which bytes a file is asked for."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import pytest

from petalite.errors import InvalidCheckpoint
from petalite.model.reading import one_ahead, read_through


def test_one_is_made_while_one_is_used() -> None:
    """The second is begun before the first is given back, and the third not before the second was taken."""
    begun = [threading.Event() for _ in range(4)]

    def make(index: int) -> int:
        begun[index].set()
        return index * 10

    found = []
    for result in one_ahead(make, range(4)):
        found.append(result)
        if len(found) < 4:
            assert begun[len(found)].wait(10)
        assert not any(event.is_set() for event in begun[len(found) + 1 :])
    assert found == [0, 10, 20, 30]
    assert list(one_ahead(make, range(0))) == []


def test_an_error_comes_where_its_result_would() -> None:
    def make(index: int) -> int:
        if index == 2:
            raise InvalidCheckpoint("the third")
        return index

    results = one_ahead(make, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InvalidCheckpoint, match="the third"):
        next(results)
    assert list(results) == []


def test_who_stops_half_way_leaves_no_thread() -> None:
    results = one_ahead(lambda index: index, range(9))
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if "petalite-reader" in thread.name]


class Thing:
    pass


def test_what_was_given_is_not_kept() -> None:
    results = one_ahead(lambda index: Thing(), range(2))
    first = next(results)
    seen = weakref.ref(first)
    del first
    next(results)
    assert seen() is None


@pytest.mark.parametrize("size", [1, 5 << 20, 50 << 20])
def test_exactly_the_ranges_are_asked_for(size: int, tmp_path: Path, monkeypatch) -> None:
    """Joined where they touch; the kernel reads on by itself only far from a range's end."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(size + 100)
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, n, advice: advised.append((os.lseek(fd, 0, 1), advice))
    )
    asked: list[tuple[int, int]] = []

    class Watched:
        def __init__(self, file) -> None:
            self._file = file

        def __getattr__(self, name: str):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *about) -> None:
            self._file.close()

        def readinto(self, buffer) -> int:
            start = self._file.tell()
            n_read: int = self._file.readinto(buffer)
            asked.append((start, start + n_read))
            return n_read

    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Watched(plain(self, *a, **k)))
    half = size // 2
    read_through(path, [(half, size), (0, half), (size + 50, size + 60), (size + 60, size + 60)])
    runs = []
    for start, end in asked:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    assert runs == [(0, size), (size + 50, size + 60)]
    on = [position for position, advice in advised if advice == os.POSIX_FADV_NORMAL]
    assert all(position < size - (16 << 20) for position in on) and bool(on) == (size > 20 << 20)


def test_a_file_that_is_not_there_or_ends_early(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="cannot read"):
        read_through(tmp_path / "absent", [(0, 1)])
    (tmp_path / "short").write_bytes(b"abc")
    read_through(tmp_path / "short", [(0, 10)])
