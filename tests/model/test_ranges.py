"""Partial files against a local server that speaks ranges: only what is wanted, resumed, and servers that do
not.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from petalite.errors import InvalidCheckpoint
from petalite.model import ranges
from petalite.model.checkpoint import Checkpoint
from petalite.model.ranges import PartialFile, http_range
from petalite.model.span import load_span
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.disk import room_for


class Server(ThreadingHTTPServer):
    """Serves a folder. `sent` counts bytes of answers; `breaks_after` cuts every answer short; `mode`
    misbehaves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []
        self.sent = 0
        self.breaks_after: int | None = None
        self.mode = "ranges"
        self.redirects: dict[str, str] = {}
        self.tokens: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.rpartition("/")[2]
        wanted = self.headers.get("Range")
        self.server.asked.append((path.name, wanted))
        self.server.tokens.append(self.headers.get("Authorization"))
        if path.name in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[path.name])
            self.end_headers()
            return
        if not path.exists():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        size = len(data)
        extra = {"ETag": '"x"', "X-Repo-Commit": "0123abcd"}
        if wanted and self.server.mode != "whole":
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            if self.server.mode == "other":
                first += 1
            data, status = data[first : last + 1], 206
            extra["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send_response(status)
        for name, value in extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            data = data[: self.server.breaks_after]
            self.server.sent += len(data)
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(ranges, "CHUNK_BYTES", 1000)
    (tmp_path / "remote").mkdir()
    with Server(tmp_path / "remote") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def data(server: Server) -> bytes:
    data = bytes(torch.randint(0, 256, (54_321,), dtype=torch.uint8).tolist())
    (server.folder / "file").write_bytes(data)
    return data


def fetch(server: Server, start: int, end: int) -> Iterator[bytes]:
    return http_range(f"{server.url}/file", {}, start, end)


def partial(tmp_path: Path, pauses: list[float] | None = None) -> PartialFile:
    return PartialFile(tmp_path / "copy" / "file", 54_321, pause=([] if pauses is None else pauses).append)


WANTED = [(1500, 2500), (2900, 4001), (54_300, 54_321), (10, 10)]


def test_only_the_chunks_of_what_is_wanted(server: Server, data: bytes, tmp_path: Path) -> None:
    file = partial(tmp_path)
    file.ensure(WANTED, lambda start, end: fetch(server, start, end))
    copy = file.path.read_bytes()
    assert len(copy) == len(data)
    for start, end in WANTED:
        assert copy[start:end] == data[start:end]
    assert [wanted for _, wanted in server.asked] == ["bytes=1000-4999", "bytes=54000-54320"]
    assert server.sent == 4000 + 321
    file.ensure(WANTED, lambda start, end: pytest.fail("fetched again"))
    partial(tmp_path).ensure([(4000, 5000)], lambda start, end: pytest.fail("forgotten"))


def test_a_broken_connection_goes_on_where_it_ended(server: Server, data: bytes, tmp_path: Path) -> None:
    """Each answer brings 7700 bytes: seven chunks are kept, the eighth is asked for again."""
    server.breaks_after = 7700
    pauses: list[float] = []
    file = partial(tmp_path, pauses)
    file.ensure([(0, 54_321)], lambda start, end: fetch(server, start, end))
    assert file.path.read_bytes() == data
    assert [wanted for _, wanted in server.asked] == [f"bytes={n}-54320" for n in range(0, 54_321, 7000)]
    assert pauses == []


def test_what_brings_nothing_is_given_up(server: Server, data: bytes, tmp_path: Path) -> None:
    server.breaks_after = 900
    pauses: list[float] = []
    with pytest.raises(InvalidCheckpoint, match=r"cannot fetch file: .*start again to go on"):
        partial(tmp_path, pauses).ensure([(0, 9000)], lambda start, end: fetch(server, start, end))
    assert len(server.asked) == 6 and pauses == [0.2, 0.4, 0.8, 1.6, 3.2]
    server.breaks_after = None
    file = partial(tmp_path)
    file.ensure([(0, 9000)], lambda start, end: fetch(server, start, end))
    assert file.path.read_bytes()[:9000] == data[:9000]


@pytest.mark.parametrize("mode", ["whole", "other"])
def test_a_server_that_gives_something_else(mode: str, server: Server, data: bytes, tmp_path: Path) -> None:
    server.mode = mode
    with pytest.raises(InvalidCheckpoint, match="does not give ranges"):
        partial(tmp_path).ensure([(0, 10)], lambda start, end: fetch(server, start, end))
    with pytest.raises(InvalidCheckpoint, match=r"cannot fetch file: .*404"):
        partial(tmp_path).ensure([(0, 10)], lambda s, e: http_range(f"{server.url}/none", {}, s, e))


def test_more_than_was_asked_for_is_cut(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "file", 10)
    file.ensure([(0, 10)], lambda start, end: iter([b"0123456", b"789and more", b"and more"]))
    assert file.path.read_bytes() == b"0123456789"


def test_a_server_that_never_stops_is_left(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "file", 10)
    file.ensure([(0, 10)], lambda start, end: itertools.repeat(b"0123"))
    assert file.path.read_bytes() == b"0123012301"


def test_a_range_beyond_a_short_file(tmp_path: Path) -> None:
    PartialFile(tmp_path / "file", 5).ensure([(0, 8)], lambda start, end: iter([b"01234"]))
    assert (tmp_path / "file").read_bytes() == b"01234"


def test_a_disk_that_fills_marks_nothing_that_is_not_there(
    server: Server, data: bytes, tmp_path: Path
) -> None:
    file = partial(tmp_path)
    with room_for(2500), pytest.raises(InvalidCheckpoint, match="cannot write"):
        file.ensure([(0, 6000)], lambda start, end: (data[at : at + 500] for at in range(start, end, 500)))
    with room_for(2600), pytest.raises(InvalidCheckpoint, match="cannot write"):
        file.ensure([(0, 6000)], lambda start, end: iter([data[start:end]]))
    file.ensure([(0, 6000)], lambda start, end: fetch(server, start, end))
    assert file.path.read_bytes()[:6000] == data[:6000]


def test_two_that_begin_at_once(
    server: Server, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second saw no file, and makes one after the first has begun to fill it."""
    first = partial(tmp_path)
    fetched = iter([0])

    def fetch_beside_another(start: int, end: int) -> Iterator[bytes]:
        yield data[start : start + 2500]
        if next(fetched, None) is not None:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "exists", lambda path: False)
                partial(tmp_path)
        yield data[start + 2500 : end]

    first.ensure([(0, 6000)], fetch_beside_another)
    assert first.path.read_bytes()[:6000] == data[:6000]
    partial(tmp_path).ensure([(0, 6000)], lambda start, end: pytest.fail("fetched again"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"")
    with pytest.raises(InvalidCheckpoint, match="cannot write"):
        partial(tmp_path)


def test_a_token_does_not_follow_a_redirect(server: Server, data: bytes) -> None:
    server.redirects["file"] = f"{server.url}/elsewhere"
    (server.folder / "elsewhere").write_bytes(data)
    answer = http_range(f"{server.url}/file", {"authorization": "Bearer secret"}, 0, 10)
    assert b"".join(answer) == data[:10]
    assert server.tokens == ["Bearer secret", None]


# -- a checkpoint on a hub -------------------------------------------------------------------------------


@pytest.fixture
def repository(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """`owner/tiny`, its weights in one file, at a hub that is `server`."""
    tiny_llama(server.folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo, name, **_: f"{server.url}/{repo}/{name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        if not (server.folder / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        folder = tmp_path / "snapshots" / "0123abcd"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((server.folder / name).read_bytes())
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return server


def test_a_span_of_a_repository_is_fetched_by_range(repository: Server, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("owner/tiny")
    span = load_span(checkpoint, 1, 2)
    local = load_span(Checkpoint.open(repository.folder), 1, 2)
    hidden = torch.randn(1, 4, 64)
    assert torch.equal(span.forward_stateless(hidden), local.forward_stateless(hidden))
    whole = (repository.folder / "model.safetensors").stat().st_size
    assert checkpoint.bytes_read <= repository.sent < checkpoint.bytes_read + 25_000 < whole / 2
    sent = repository.sent
    load_span(Checkpoint.open("owner/tiny"), 1, 2)
    assert repository.sent == sent


def test_a_download_that_was_cut_off_is_resumed(repository: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_FIRST_PAUSE_S", 0.0)
    repository.breaks_after = 20_500
    load_span(Checkpoint.open("owner/tiny"), 0, 1)
    first = repository.sent
    repository.breaks_after = 100  # too little for a chunk
    with pytest.raises(InvalidCheckpoint, match=r"cannot fetch model\.safetensors"):
        load_span(Checkpoint.open("owner/tiny"), 0, 3)
    repository.breaks_after, repository.sent = None, 0
    checkpoint = Checkpoint.open("owner/tiny")
    load_span(checkpoint, 0, 3)
    assert repository.sent < checkpoint.bytes_read * 2 / 3 + 10_000 and first > 0


def test_a_hub_that_cannot_be_reached_for_a_while(
    repository: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are refused, as by huggingface_hub's HTTP library, once each time a place is asked for."""
    monkeypatch.setattr(ranges, "_FIRST_PAUSE_S", 0.0)
    checkpoint = Checkpoint.open("owner/tiny")
    checkpoint.file("tokenizer.json")
    ask, refused = huggingface_hub.get_hf_file_metadata, iter([False, True, True, False])

    def metadata(url: str) -> Any:
        if next(refused, False):
            raise ConnectionRefused("connection refused")
        return ask(url)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    load_span(checkpoint, 0, 1)
    assert next(refused, None) is None


def test_a_file_whose_making_was_cut_off(repository: Server, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "petalite" / "owner--tiny" / "0123abcd"
    place.mkdir(parents=True)
    (place / "model.safetensors").touch()
    load_span(Checkpoint.open("owner/tiny"), 0, 1)
    assert (place / "model.safetensors").stat().st_size > 0


def test_a_hub_that_cannot_be_reached_at_all(repository: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open("owner/tiny")

    def refuse(url: str) -> Any:
        raise ConnectionRefused("connection refused")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(InvalidCheckpoint, match=r"cannot fetch model\.safetensors .*refused"):
        load_span(checkpoint, 0, 1)


class ConnectionRefused(Exception):
    """Like those of the HTTP library beneath the hub's, no OSError."""
