"""Weights from peers: only what is wanted comes, it is right or refused, and what broke off goes on."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import petalite
from petalite.errors import (
    BadMessage,
    InvalidArgument,
    InvalidCheckpoint,
    Refused,
    ResourceLimit,
    ShuttingDown,
    Unreachable,
    WrongModel,
)
from petalite.model import tensorstore
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint, FolderFiles
from petalite.model.hashing import write_manifest
from petalite.model.manifest import Manifest
from petalite.model.span import BlockSpan, load_span
from petalite.model.tensorstore import TensorStore
from petalite.net.host import Host
from petalite.net.identity import Identity, PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Call
from petalite.net.schema import encode
from petalite.server import loaded
from petalite.server.giving import WeightsService, gives
from petalite.server.loaded import ComputeSettings
from petalite.server.node import Node
from petalite.server.server import BlockServer, ServerSettings
from petalite.server.throughput import BlockSpeed
from petalite.swarm import weights
from petalite.swarm.spans import Span
from petalite.swarm.weights import METHOD, PeerWeights, ReadWeights, open_model
from tests.helpers.checkpoints import tiny_llama

PROMPT = list(range(20))
LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
PIECE = 4096  # so that tensors have several
BLOCK = "model.layers.1.mlp.up_proj.weight"  # (96, 64) float32: six pieces
Tamper = Callable[[ReadWeights, int, bytes], tuple[int, bytes]]


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tensorstore, weights):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(weights, "PAUSE_S", 0.01)
    monkeypatch.setattr(loaded, "measure", lambda span: BlockSpeed(0.001, 0.001))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("giver") / "tiny", num_hidden_layers=6)
    write_manifest(Checkpoint.open(folder))
    return folder


class Giver(WeightsService):
    """Gives the folder's weights, after `tamper` has had its way; counts what it is asked."""

    tamper: Tamper | None = None
    asked = 0
    fails: Exception | None = None
    silent_from = 1 << 30

    async def _serve(self, call: Call, request: ReadWeights) -> None:
        if self.asked >= self.silent_from:
            await asyncio.Event().wait()
        await super()._serve(call, request)

    def _read(self, request: ReadWeights) -> tuple[int, bytes]:
        self.asked += 1
        if self.fails is not None:
            raise self.fails
        size, data = super()._read(request)
        return self.tamper(request, size, data) if self.tamper else (size, data)


class Swarm:
    """Givers of one model, and who fetches from them, over loopback."""

    def __init__(self, model: Path, folder: Path, stack: AsyncExitStack) -> None:
        self.model, self.folder, self._stack = model, folder, stack
        self.model_id = Checkpoint.open(model).model_id()
        self.known: list[PeerId] = []

    async def start(self) -> None:
        self.host = await self._stack.enter_async_context(Host(Identity.generate()))

    async def giver(self, tamper: Tamper | None = None, fails: Exception | None = None) -> Giver:
        host = await self._stack.enter_async_context(Host(Identity.generate()))
        (address,) = await host.listen([LOOPBACK])
        giver = Giver(host, Checkpoint.open(self.model), self.model_id)
        giver.tamper, giver.fails = tamper, fails
        self.host.book.add(host.peer_id, [address])
        self.known.append(host.peer_id)
        return giver

    def weights(self, patience_s: float = 0.2) -> PeerWeights:
        peer: Any = SimpleNamespace(host=self.host, dht=None)
        found = PeerWeights(peer, self.model_id, patience_s)

        async def givers() -> list[PeerId]:
            return [known for known in self.known if known not in found.liars]

        found.givers = givers  # type: ignore[method-assign]
        return found

    async def store(self, fetching: PeerWeights) -> TensorStore:
        if not self.folder.exists():
            await fetching.bring_files(self.folder, "tiny")
        manifest = Checkpoint(FolderFiles(self.folder)).manifest
        assert manifest is not None
        return TensorStore(self.folder, "tiny", manifest, fetching.fetch)


@pytest.fixture
async def swarm(model: Path, tmp_path: Path) -> AsyncIterator[Swarm]:
    async with AsyncExitStack() as stack:
        swarm = Swarm(model, tmp_path / "fetched", stack)
        await swarm.start()
        yield swarm


def forward(span: BlockSpan) -> torch.Tensor:
    cache = span.new_cache()
    row = cache.open_row(4, span.start, span.end)
    states = torch.ones(3, 64)
    return span.forward(states, [Segment(row, 0, 3)], cache, start=span.start, end=span.end)


def stored(store: TensorStore | FolderFiles, name: str) -> bytes:
    found = Checkpoint(store).stored(name)
    assert found is not None
    return found[0].read_bytes()[found[1].start : found[1].end]


async def test_blocks_are_fetched_as_they_are_loaded_and_no_others(swarm: Swarm) -> None:
    """From two givers; the blocks are those of the folder, and little else is on the disk."""
    first, second = await swarm.giver(), await swarm.giver()
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    span = await asyncio.to_thread(load_span, Checkpoint(store), 2, 4)
    expected = load_span(Checkpoint.open(swarm.model), 2, 4)
    assert torch.equal(forward(span), forward(expected))
    assert first.asked > 10
    assert second.asked > 10
    tensors = [name for name in Checkpoint.open(swarm.model).shard_of if store.is_here(name)]
    assert {name.split(".")[2] for name in tensors} == {"2", "3"}
    size = (store.folder / "model.safetensors").stat()
    assert size.st_blocks * 512 < size.st_size / 2
    asked = first.asked + second.asked
    await asyncio.to_thread(load_span, Checkpoint(await swarm.store(fetching)), 2, 4)
    assert first.asked + second.asked == asked  # what is here is not fetched again


async def test_files_come_too_and_the_id_is_the_same(swarm: Swarm) -> None:
    await swarm.giver()
    store = await swarm.store(swarm.weights())
    for name in ("config.json", "tokenizer.json", "manifest.json"):
        assert (swarm.folder / name).read_bytes() == (swarm.model / name).read_bytes()
    assert Checkpoint(store).model_id() == swarm.model_id
    assert gives(Checkpoint(store))


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:] if data else data


LIES: dict[str, Tamper] = {
    "wrong bytes": lambda request, size, data: (size, flip(data)),
    "too few": lambda request, size, data: (size, data[:-1]),
    "too many": lambda request, size, data: (size, data + b"x"),
    "nothing": lambda request, size, data: (size, b""),
    "another size": lambda request, size, data: (size + 1, data),
    "without end": lambda request, size, data: (1 << 50, bytes(request.end - request.start)),
}


@pytest.mark.parametrize("lie", LIES)
async def test_lies_about_tensors_are_found_and_their_teller_banned(swarm: Swarm, lie: str) -> None:
    liar = await swarm.giver(lambda request, size, data: (size, data))
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    liar.tamper = LIES[lie]
    with pytest.raises(Unreachable, match=r"manifest\.json does"):
        await fetching.bring_tensors(store, [BLOCK])
    assert fetching.liars == {swarm.known[0]}
    assert not store.is_here(BLOCK)
    await swarm.giver()
    await fetching.bring_tensors(store, [BLOCK])
    assert stored(store, BLOCK) == stored(FolderFiles(swarm.model), BLOCK)
    with pytest.raises(petalite.errors.PetaliteError):
        await swarm.host.call(swarm.known[0], METHOD, encode(ReadWeights("x", "y", 0, 1)), timeout_s=5)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("lie", ["wrong bytes", "too few", "without end"])
async def test_lies_about_files_are_found(swarm: Swarm, name: str, lie: str) -> None:
    await swarm.giver(
        lambda request, size, data: LIES[lie](request, size, data) if request.name == name else (size, data)
    )
    await swarm.giver()
    fetching = swarm.weights()
    await swarm.store(fetching)
    assert fetching.liars == {swarm.known[0]}
    assert Checkpoint.open(swarm.folder).manifest is not None


@pytest.mark.parametrize("silent_from", [0, 2])
async def test_who_gives_nothing_more_is_not_waited_for(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, silent_from: int
) -> None:
    """Two of three, from the first piece on or from a later one; no more are asked than it takes."""
    monkeypatch.setattr(weights, "NEXT_S", 0.05)
    monkeypatch.setattr(weights, "PIECE_S", 3600.0)
    givers = [await swarm.giver() for _ in range(4)]
    for giver in givers[:2]:
        giver.silent_from = silent_from
    fetching = swarm.weights()
    async with asyncio.timeout(30):
        await swarm.store(fetching)
    assert Checkpoint.open(swarm.folder).model_id("tiny") == swarm.model_id
    assert [giver.asked for giver in givers[:2]] == [silent_from] * 2
    assert not fetching.liars


async def test_a_config_of_another_model_is_refused(swarm: Swarm, tmp_path: Path) -> None:
    """It and its manifest are in order, but are not what the id names."""
    other = tiny_llama(tmp_path / "other", num_hidden_layers=6, rope_theta=1e6)
    write_manifest(Checkpoint.open(other))
    giver = await swarm.giver()
    giver._checkpoint = Checkpoint.open(other)
    fetching = swarm.weights()
    with pytest.raises(Unreachable):
        await swarm.store(fetching)
    assert fetching.liars == {swarm.known[0]}
    assert not swarm.folder.exists()


async def test_what_broke_off_goes_on_with_another_giver(swarm: Swarm) -> None:
    """Also in a later life: some pieces of six came, and only the others are asked for again."""
    left = 3

    def breaks_off(request: ReadWeights, size: int, data: bytes) -> tuple[int, bytes]:
        nonlocal left
        if not request.is_file:
            if not left:
                raise ResourceLimit("enough")
            left -= 1
        return size, data

    await swarm.giver(breaks_off)
    fetching = swarm.weights()
    with pytest.raises(Unreachable, match="enough"):
        await fetching.bring_tensors(await swarm.store(fetching), [BLOCK])
    second = await swarm.giver()
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    missing = len(store.missing(BLOCK))
    assert 3 <= missing < 6
    await fetching.bring_tensors(store, [BLOCK])
    assert second.asked == missing
    assert not fetching.liars
    assert stored(store, BLOCK) == stored(FolderFiles(swarm.model), BLOCK)


async def test_wrong_pieces_from_before_are_nobodys_fault(swarm: Swarm) -> None:
    """A piece on the disk is broken: the tensor comes again, and whoever gives the rest is not blamed."""
    giver = await swarm.giver()
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    store.write(BLOCK, 0, bytes(PIECE))
    await fetching.bring_tensors(store, [BLOCK])
    assert not fetching.liars
    assert giver.asked > 6
    assert stored(store, BLOCK) == stored(FolderFiles(swarm.model), BLOCK)


async def test_a_giver_without_some_tensors_gives_the_others(swarm: Swarm) -> None:
    """As one does that fetched a part itself."""
    first = await swarm.giver(fails=Refused("not here"))
    second = await swarm.giver(
        lambda request, size, data: (size, data) if request.name != BLOCK else _refuse()
    )
    third = await swarm.giver()
    first.fails = None
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    first.fails = Refused("not here")
    names = [name for name in Checkpoint.open(swarm.model).shard_of if ".1." in name]
    await fetching.bring_tensors(store, names)
    assert all(map(store.is_here, names))
    assert not fetching.liars
    assert second.asked
    assert third.asked


def _refuse() -> tuple[int, bytes]:
    raise Refused("not here")


@pytest.mark.parametrize("left_bytes", [0, 3 * PIECE])
async def test_a_disk_that_fills(swarm: Swarm, monkeypatch: pytest.MonkeyPatch, left_bytes: int) -> None:
    """What was written stays, the error says why, and with room it goes on."""
    giver = await swarm.giver()
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    write, left = TensorStore.write, left_bytes

    def full(self: TensorStore, name: str, start: int, data: Any) -> None:
        nonlocal left
        if left < len(data):
            self._path.chmod(0o600)
            raise tensorstore._cannot_write(self._path, OSError(28, "No space left on device"))
        left -= len(data)
        write(self, name, start, data)

    monkeypatch.setattr(TensorStore, "write", full)
    with pytest.raises(InvalidCheckpoint, match="No space left"):
        await fetching.bring_tensors(store, [BLOCK])
    monkeypatch.setattr(TensorStore, "write", write)
    asked = giver.asked
    await fetching.bring_tensors(store, [BLOCK])
    assert giver.asked - asked <= 6 - left_bytes // PIECE + weights.IN_FLIGHT
    usage = shutil.disk_usage(swarm.folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InvalidCheckpoint, match="are free"):
        await asyncio.to_thread(load_span, Checkpoint(store), 4, 5)


WRONG_REQUESTS = {
    "model": (ReadWeights("other@0", BLOCK, 0, 8), WrongModel),
    "tensor": (ReadWeights("", "model.layers.99.w", 0, 8), Refused),
    "file": (ReadWeights("", "../../etc/passwd", 0, 8, is_file=True), Refused),
    "weights as a file": (ReadWeights("", "model.safetensors", 0, 8, is_file=True), Refused),
    "too much": (ReadWeights("", BLOCK, 0, 1 << 30), BadMessage),
    "backwards": (ReadWeights("", BLOCK, 8, 0), BadMessage),
}


@pytest.mark.parametrize("case", WRONG_REQUESTS)
async def test_what_is_not_given(swarm: Swarm, case: str) -> None:
    request, error = WRONG_REQUESTS[case]
    await swarm.giver()
    body = encode(request) | ({} if request.model_id else {"model_id": swarm.model_id})
    with pytest.raises(error):
        await swarm.host.call(swarm.known[0], METHOD, body, timeout_s=5)


async def test_a_folder_that_changes_is_not_given_any_more(swarm: Swarm, tmp_path: Path) -> None:
    copy = shutil.copytree(swarm.model, tmp_path / "copy")
    giver = await swarm.giver()
    giver._checkpoint = Checkpoint.open(copy)
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    tiny_llama(copy, seed=1, num_hidden_layers=6)
    with pytest.raises(Unreachable, match="cannot be read here any more"):
        await fetching.bring_tensors(store, [BLOCK])
    assert not fetching.liars


# -- whole nodes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(model: Path) -> list[int]:
    with petalite.load(str(model)) as alone:
        return alone.generate(PROMPT, max_new_tokens=6).token_ids


async def test_a_swarm_needs_one_folder_once(
    model: Path, text: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second server fetches its blocks from the first, a third from both, a client its edges and tokenizer;
    and the first may go.
    """
    model_id = Checkpoint.open(model).model_id()
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []

        async def serve(what: str, blocks: str) -> BlockServer:
            peers = [address for node in nodes[:1] for address in node.addresses]
            node = Node(listen=[str(LOOPBACK)], peers=peers)
            nodes.append(await stack.enter_async_context(node))
            compute = ComputeSettings(threads=1, cache=tmp_path / "cache")
            return await node.serve(
                what, ServerSettings(blocks=Span.parse(blocks), compute=compute, drain_s=0.1)
            )

        hub = await stack.enter_async_context(Node(listen=[str(LOOPBACK)]))
        nodes.append(hub)
        first = await serve(str(model), "0:6")
        second = await serve(model_id, "0:3")
        assert second.model_id == model_id
        third = await serve(model_id, "2:6")
        assert third.checkpoint.folder != second.checkpoint.folder
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "client"))
        async with petalite.Swarm(peers=hub.addresses) as joined:
            told = await joined.model(model_id)
            assert (await told.generate(PROMPT, max_new_tokens=6)).token_ids == text
            assert told.encode("bytes") == (await joined.model(str(model))).encode("bytes")
        await first.close()
        fourth = await serve(model_id, "1:6")
        await third.close()
        async with petalite.Swarm(peers=hub.addresses) as joined:
            opened = await joined.model(str(model))
            assert (await opened.generate(PROMPT, max_new_tokens=6)).token_ids == text
        await second.prepare(Span(3, 6))
        await fourth.close()
        await second.move(Span(3, 6))  # nobody is left to give it anything
        assert second.span == Span(3, 6)
        assert fourth.span == Span(1, 6)


async def test_nobody_gives_it(tmp_path: Path) -> None:
    async with Node(listen=[str(LOOPBACK)]) as node:
        with pytest.raises(Unreachable, match="nobody gives"):
            await open_model(node.peer, f"tiny@{'0' * 32}", tmp_path, patience_s=0.0)
        with pytest.raises(InvalidArgument, match="no model id"):
            await open_model(node.peer, "tiny", tmp_path)


def test_manifests_name_files(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    manifest = Checkpoint.open(copy).manifest
    assert manifest is not None
    assert set(manifest.files) == {"config.json", "tokenizer.json"}
    (copy / "tokenizer.json").write_text("{}")
    assert write_manifest(Checkpoint.open(copy)).digest != manifest.digest
    for files in (
        [],
        {"evil.sh": {"size": 1, "sha256": "0" * 64}},
        {"config.json": {"size": -1, "sha256": "0" * 64}},
    ):
        with pytest.raises(InvalidCheckpoint, match="manifest"):
            Manifest.parse({"version": 1, "tensors": {}, "files": files}, source="manifest.json")


async def test_nothing_is_fetched_once_it_is_closed(swarm: Swarm) -> None:
    """A thread that loads may come with its next tensors after that: the folder is somebody else's now."""
    giver = await swarm.giver()
    fetching = swarm.weights()
    store = await swarm.store(fetching)
    asked = giver.asked
    fetching.close()
    with pytest.raises(ShuttingDown):
        await asyncio.to_thread(fetching.fetch, store, [BLOCK])
    assert giver.asked == asked
