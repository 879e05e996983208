"""Weights from peers: the RPC `weights`, by which a server gives parts of a model, and how a model is
fetched.

Whoever fetches trusts nobody but the model id, `name@digest`: the digest is over the config and the
manifest's digest (`model.checkpoint`), and the manifest has the SHA-256 of every tensor and file. So config
and manifest prove themselves against the id, and everything else against the manifest. What does not is
thrown away and counts against who gave it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
import statistics
import tempfile
import threading
import time
from asyncio import FIRST_COMPLETED
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from petalite.errors import (
    BadMessage,
    DeadlineExceeded,
    InvalidArgument,
    InvalidCheckpoint,
    NetworkError,
    PetaliteError,
    Refused,
    RemoteError,
    ShuttingDown,
    Unreachable,
    UnsupportedModel,
)
from petalite.model.checkpoint import Checkpoint, FolderFiles
from petalite.model.manifest import Manifest
from petalite.model.tensorstore import PIECE_BYTES, TensorStore
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.limits import VIOLATION
from petalite.net.schema import decode, encode, length
from petalite.net.streams import Priority
from petalite.swarm.directory import Directory, find_models
from petalite.swarm.messages import Count, Text
from petalite.swarm.peer import SwarmPeer
from petalite.swarm.spans import Span

logger = logging.getLogger(__name__)

METHOD = "weights"
MODEL_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)@[0-9a-f]{32}")
_CONFIG = "config.json"
_MOST_CONFIG_BYTES = 1 << 20

MOST_FOLDERS = 16  # of one model, for as many processes of this machine
MOST_GIVERS = 4  # that are asked at once
IN_FLIGHT = 3  # pieces asked of one of them at once
FIND_S = 10.0
FRESH_S = 5.0  # a directory read so recently says who gives
NEXT_S = 3.0  # without a piece of a file, until one more giver is asked
FILES_S = 300.0  # for one giver to give config, manifest and files
PIECE_S = 30.0  # for one piece, at most
SLOW = 20.0  # times what pieces usually take: who is slower is left
LEAST_PIECE_S = 3.0
PATIENCE_S = 60.0  # without a piece from anybody
PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0


@dataclass(frozen=True, slots=True)
class ReadWeights:
    """Give bytes [start, end) of a tensor, or of a file beside the weights."""

    model_id: Text
    name: Annotated[str, length(1, 512)]
    start: Count
    end: Count
    is_file: bool = False


@dataclass(frozen=True, slots=True)
class WeightsRead:
    """Comes with one buffer: those of the bytes that there are."""

    size: Count  # of the whole tensor or file


class _Hostile(Exception):
    """A giver broke a rule or gave what the digest does not allow."""


def names_model(path_or_repo: str) -> bool:
    """Whether this is a model's id, and no folder."""
    return MODEL_ID.fullmatch(path_or_repo) is not None and not Path(path_or_repo).is_dir()


def kept_folder() -> Path:
    """Where models that were fetched are kept: in the user's cache, petalite's part of it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petalite" / "fetched"


async def open_model(
    peer: SwarmPeer, model_id: str, folder: Path | None = None, *, patience_s: float = PATIENCE_S
) -> tuple[Checkpoint, PeerWeights]:
    """A model by its id: config, manifest and tokenizer from servers that have them, tensors from then on as
    they are read, which must be on another thread than the loop's, until the weights are closed. All is kept
    in `folder`, by default `kept_folder()`, for the next time too.

    Raises InvalidArgument for what is no id, Unreachable where nobody gives it, InvalidCheckpoint where the
    disk does not take it.
    """
    match = MODEL_ID.fullmatch(model_id)
    if match is None:
        raise InvalidArgument(f"{model_id!r} is no model id; expected NAME@ and 32 hexadecimal digits")
    name = match[1]
    weights = PeerWeights(peer, model_id, patience_s)
    try:
        kept = weights.lock((folder or kept_folder()) / model_id.replace("/", "--"))
        if not (kept / Manifest.FILE).exists():
            await weights.bring_files(kept, name)
        elif _opened(kept, model_id, name) is None:
            raise InvalidCheckpoint(f"{kept} does not hold {model_id} any more; remove it and start again")
        manifest = Checkpoint(FolderFiles(kept)).manifest
        assert manifest is not None
        checkpoint = Checkpoint(TensorStore(kept, name, manifest, weights.fetch))
    except BaseException:
        weights.close()
        raise
    weights.narrow(checkpoint.config.n_blocks)
    return checkpoint, weights


def _opened(folder: Path, model_id: str, name: str) -> Checkpoint | None:
    """What the folder's config and manifest are, if they are what the id says."""
    checkpoint = Checkpoint(FolderFiles(folder))
    is_right = checkpoint.manifest is not None and checkpoint.model_id(name) == model_id
    return checkpoint if is_right else None


class PeerWeights:
    """One model's weights in the swarm."""

    def __init__(self, peer: SwarmPeer, model_id: str, patience_s: float) -> None:
        self._peer = peer
        self._host: Host = peer.host
        self._model_id = model_id
        self._patience_s = patience_s
        self._directory: Directory | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.current_thread()
        self.liars: set[PeerId] = set()
        self._fetching: set[asyncio.Task[None]] = set()
        self._closed = False
        self._locked: IO[bytes] | None = None
        self._usual_s: deque[float] = deque(maxlen=64)  # that pieces took
        self._came = 0  # pieces of files

    def narrow(self, n_blocks: int) -> None:
        """Look for servers of so many blocks, now that this is known."""
        self._directory = Directory(self._peer.dht, self._model_id, Span(0, n_blocks))

    def close(self) -> None:
        """End what is being fetched, and let others have the folder. On the loop's thread."""
        self._closed = True
        for task in self._fetching:
            task.cancel()
        if self._locked is not None:
            self._locked.close()

    def lock(self, folder: Path) -> Path:
        """A folder that no other process fetches into: this one, or one with a number behind its name."""
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for number in range(1, MOST_FOLDERS + 1):
                free = folder.with_name(f"{folder.name}.{number}") if number > 1 else folder
                self._locked = free.with_name(f"{free.name}.lock").open("ab")
                try:
                    fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return free
                except BlockingIOError:
                    self._locked.close()
        except OSError as error:
            raise InvalidCheckpoint(f"cannot write {folder.parent}: {error.strerror or error}") from error
        raise InvalidCheckpoint(f"{MOST_FOLDERS} processes fetch into {folder.parent} already")

    async def givers(self) -> list[PeerId]:
        """Who says that it gives the model's weights, in random order. Raises NetworkError."""
        if self._directory is None:
            models = await find_models(self._peer.dht, timeout_s=FIND_S)
            sizes = [model.n_blocks for model in models if model.model_id == self._model_id]
            if not sizes:
                return []
            self.narrow(max(sizes))
        assert self._directory is not None
        if self._directory.age_s > FRESH_S:
            await self._directory.refresh(timeout_s=FIND_S)
        found = []
        for entry in self._directory.servers:
            if entry.record.gives_weights and entry.peer not in {*self.liars, self._host.peer_id}:
                self._host.book.add(entry.peer, entry.addresses)
                found.append(entry.peer)
        return random.sample(found, len(found))

    # -- files -------------------------------------------------------------------------------------------

    async def bring_files(self, folder: Path, name: str) -> None:
        """Config, manifest and the files that the manifest names, all of one giver, into a new folder."""

        async def bring(giver: PeerId) -> None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as text:
                unfinished = Path(text) / "model"
                unfinished.mkdir()
                await self._bring_files(giver, unfinished, name)
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)

        try:
            await self._from_anybody(bring)
        except OSError as error:
            raise InvalidCheckpoint(f"cannot write {folder}: {error.strerror or error}") from error

    async def _bring_files(self, giver: PeerId, folder: Path, name: str) -> None:
        for file, most in ((Manifest.FILE, Manifest.MOST_FILE_BYTES), (_CONFIG, _MOST_CONFIG_BYTES)):
            (folder / file).write_bytes(await self._file(giver, file, most))
        try:
            checkpoint = _opened(folder, self._model_id, name)
        except InvalidCheckpoint as error:
            raise _Hostile(str(error)) from error
        if checkpoint is None:
            raise _Hostile("config and manifest are not what the model id says")
        assert checkpoint.manifest is not None
        for file, (size, digest) in checkpoint.manifest.files.items():
            data = await self._file(giver, file, size)
            if hashlib.sha256(data).hexdigest() != digest:
                raise _Hostile(f"{file} is not what the manifest says")
            (folder / file).write_bytes(data)

    async def _file(self, giver: PeerId, name: str, most_bytes: int) -> bytes:
        data, size = bytearray(), 1
        while len(data) < size:
            request = ReadWeights(self._model_id, name, len(data), len(data) + PIECE_BYTES, is_file=True)
            said, piece = await self._read(giver, request, PIECE_S)
            size = said.size
            expected = min(PIECE_BYTES, size - len(data))
            if size > most_bytes or len(piece) != expected:
                raise _Hostile(f"{len(piece)} bytes of {name} where {expected} of {size} should come")
            data += piece
            self._came += 1
        return bytes(data)

    async def _from_anybody(self, bring: Callable[[PeerId], Awaitable[None]]) -> None:
        """Do it with one giver, and another beside it each time that nothing has come for a while, until one
        is good for it or the patience is over.
        """
        done: list[PeerId] = []

        async def one(giver: PeerId) -> None:
            async with asyncio.timeout(FILES_S):
                await bring(giver)
            done.append(giver)

        async def look(givers: Sequence[PeerId]) -> PetaliteError | None:
            failure: PetaliteError | None = None
            left, asked = deque(givers), dict[asyncio.Task[None], PeerId]()
            came = -1
            try:
                while not done and (left or asked):
                    if left and len(asked) < MOST_GIVERS and (not asked or self._came == came):
                        giver = left.popleft()
                        asked[asyncio.create_task(one(giver))] = giver
                    came = self._came
                    over, _ = await asyncio.wait(asked, timeout=NEXT_S, return_when=FIRST_COMPLETED)
                    for task in over:
                        failure = self._failure(asked.pop(task), task) or failure
                        came = self._came  # so that another one takes its place
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
            return failure

        await self._patiently(look, lambda: not done, lambda: len(done))

    def _failure(self, giver: PeerId, task: asyncio.Task[None]) -> PetaliteError | None:
        """Why a giver was of no use, unless it gave all, or what is wrong. Raises what is not about it."""
        try:
            task.result()
        except (NetworkError, RemoteError, UnsupportedModel) as error:
            return error
        except TimeoutError:
            return DeadlineExceeded(f"{giver.short()} took longer than {FILES_S:g} s for a few files")
        except _Hostile as error:
            self.blame(giver, error)
        return None

    async def _patiently(
        self,
        look: Callable[[Sequence[PeerId]], Awaitable[PetaliteError | None]],
        wanting: Callable[[], bool],
        progress: Callable[[], int],
    ) -> None:
        """`look` at those who give until nothing is wanting; raise Unreachable after the patience without
        progress.
        """
        failure: PetaliteError | None = None
        while wanting():
            until_s, pause_s, before = self._loop.time() + self._patience_s, PAUSE_S, progress()
            while wanting() and progress() == before:
                try:
                    failure = await look(await self.givers()) or failure
                except NetworkError as error:
                    failure = error
                if not wanting() or progress() != before:
                    break
                if self._loop.time() >= until_s:
                    raise self._nobody(failure) from failure
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    # -- tensors -----------------------------------------------------------------------------------------

    def fetch(self, store: TensorStore, names: Sequence[str]) -> None:
        """`tensorstore.Fetch`, for another thread than the loop's, which would wait for itself."""
        assert threading.current_thread() is not self._thread
        try:
            asyncio.run_coroutine_threadsafe(self._bring_while_open(store, names), self._loop).result()
        except concurrent.futures.CancelledError:
            raise ShuttingDown("the node that fetched weights is closing") from None

    async def _bring_while_open(self, store: TensorStore, names: Sequence[str]) -> None:
        if self._closed:
            raise ShuttingDown("the node that fetched weights is closed")
        task = asyncio.current_task()
        assert task is not None
        self._fetching.add(task)
        try:
            await self.bring_tensors(store, names)
        finally:
            self._fetching.discard(task)

    async def bring_tensors(self, store: TensorStore, names: Sequence[str]) -> None:
        """Into the store, each found right. Raises Unreachable when nobody gives any more of them."""
        began_s, total, pieces = time.monotonic(), sum(map(store.nbytes, names)), 0
        wanted = deque(names)
        failures: Counter[PeerId] = Counter()

        async def look(givers: Sequence[PeerId]) -> PetaliteError | None:
            nonlocal pieces
            best = sorted(givers, key=lambda giver: failures[giver])
            turns = [_Turn(self, store, giver, wanted) for giver in best[:MOST_GIVERS]]
            try:
                await _together([turn.run() for turn in turns])
            finally:
                pieces += sum(turn.brought for turn in turns)
            failures.update(turn.giver for turn in turns if turn.failure)
            return next((turn.failure for turn in turns if turn.failure), None)

        await self._patiently(look, lambda: bool(wanted), lambda: pieces)
        logger.info("fetched %d MiB in %.0f s", total >> 20, time.monotonic() - began_s)

    async def piece(self, giver: PeerId, name: str, start: int, end: int, size: int) -> memoryview:
        """Bytes of a tensor of `size` bytes."""
        began_s = self._loop.time()
        usual_s = statistics.median(self._usual_s) if self._usual_s else PIECE_S
        timeout_s = min(max(SLOW * usual_s, LEAST_PIECE_S), PIECE_S)
        said, data = await self._read(giver, ReadWeights(self._model_id, name, start, end), timeout_s)
        if said.size != size or len(data) != end - start:
            raise _Hostile(
                f"{len(data)} of {said.size} bytes of {name} where {end - start} of {size} should come"
            )
        self._usual_s.append(self._loop.time() - began_s)
        return data

    async def _read(
        self, giver: PeerId, request: ReadWeights, timeout_s: float
    ) -> tuple[WeightsRead, memoryview]:
        try:
            answer = await self._host.call(
                giver, METHOD, encode(request), timeout_s=timeout_s, priority=Priority.BULK
            )
            said = decode(WeightsRead, answer.body)
        except BadMessage as error:
            raise _Hostile(str(error)) from error
        if len(answer.buffers) != 1:
            raise _Hostile(f"an answer has one buffer, found {len(answer.buffers)}")
        return said, memoryview(answer.buffers[0])

    def blame(self, giver: PeerId, error: _Hostile) -> None:
        logger.warning("%s gives wrong weights of %s: %s", giver.short(), self._model_id, error)
        self.liars.add(giver)
        self._host.blame(giver, VIOLATION)

    def _nobody(self, failure: PetaliteError | None) -> Unreachable:
        why = "no server says that it does" if failure is None else str(failure)
        return Unreachable(
            f"nobody gives the weights of {self._model_id}: {why}; a server of a folder with a manifest.json "
            f"does (`python -m petalite.node manifest FOLDER`)"
        )


class _Turn:
    """Tensors from one giver, until none is wanted that it has, or it fails."""

    def __init__(self, weights: PeerWeights, store: TensorStore, giver: PeerId, wanted: deque[str]) -> None:
        self._weights = weights
        self._store = store
        self.giver = giver
        self._wanted = wanted
        self._refused: set[str] = set()
        self.brought = 0  # pieces
        self.failure: PetaliteError | None = None

    async def run(self) -> None:
        while (name := next((one for one in self._wanted if one not in self._refused), None)) is not None:
            self._wanted.remove(name)
            is_right = False
            try:
                is_right = await self._tensor(name)
            except _Hostile as error:
                self._weights.blame(self.giver, error)
                return
            except Refused as error:
                self._refused.add(name)
                self.failure = error
            except (NetworkError, RemoteError) as error:
                self.failure = error
                return
            finally:
                if not is_right:
                    self._wanted.append(name)

    async def _tensor(self, name: str) -> bool:
        """Whether all of it is here now and right; what came before may have been wrong."""
        store, nbytes = self._store, self._store.nbytes(name)
        pending = deque(store.missing(name))
        is_all_its_own = sum(end - start for start, end in pending) == nbytes

        async def some() -> None:
            while pending:
                start, end = pending.popleft()
                data = await self._weights.piece(self.giver, name, start, end, nbytes)
                await _to_its_end(asyncio.to_thread(store.write, name, start, data))
                self.brought += 1

        await _together([some() for _ in range(IN_FLIGHT)])
        is_right = await asyncio.to_thread(store.check, name)
        if not is_right and is_all_its_own:
            raise _Hostile(f"tensor {name} is not what the manifest says")
        return is_right


async def _to_its_end(coroutine: Coroutine[Any, Any, None]) -> None:
    """Also when cancelled: a piece that is written later would spoil what others bring meanwhile."""
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run them to their ends, or to the first error, which is raised once the others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
