"""Giving weights to peers: ranges of a model's tensors and files, where they lie, at the lowest urgency."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from petalite.errors import BadMessage, InvalidCheckpoint, Refused, WrongModel
from petalite.model.checkpoint import Checkpoint
from petalite.model.manifest import Manifest
from petalite.model.tensorstore import PIECE_BYTES
from petalite.net.host import Host
from petalite.net.methods import MethodPolicy
from petalite.net.rpc import Call
from petalite.net.schema import encode
from petalite.net.streams import Priority
from petalite.swarm.weights import METHOD, ReadWeights, WeightsRead

logger = logging.getLogger(__name__)

# A piece is in memory while it is sent, so that eight callers that do not read hold 4 MiB.
_POLICY = MethodPolicy(0, 0, max_concurrent=8, calls_per_s=200.0, priority=Priority.BULK)
_CALL_S = 60.0  # a caller that takes longer to read a piece is cut off
_ALWAYS = (Manifest.FILE, "config.json")


def gives(checkpoint: Checkpoint) -> bool:
    """Whether others can fetch the checkpoint: its tensors are as the manifest beside them says."""
    return checkpoint.quantized is None and checkpoint.manifest is not None


class WeightsService:
    """Serves what `checkpoint` has on this machine; nothing is fetched for anybody."""

    def __init__(self, host: Host, checkpoint: Checkpoint, model_id: str) -> None:
        self._checkpoint = checkpoint
        self._model_id = model_id
        host.serve(METHOD, self._serve, request=ReadWeights, policy=_POLICY)

    async def _serve(self, call: Call, request: ReadWeights) -> None:
        if request.model_id != self._model_id:
            raise WrongModel(f"this server has weights of {self._model_id}, not of {request.model_id}")
        if not 0 <= request.end - request.start <= PIECE_BYTES:
            raise BadMessage(f"bytes {request.start} to {request.end} are no piece of up to {PIECE_BYTES}")
        call.set_deadline(min(_CALL_S, call.remaining_s() or _CALL_S))
        size, data = await asyncio.to_thread(self._read, request)
        await call.send(encode(WeightsRead(size)), [data])

    def _read(self, request: ReadWeights) -> tuple[int, bytes]:
        try:
            path, start, size = self._place(request)
            with path.open("rb") as file:
                file.seek(start + min(request.start, size))
                return size, file.read(max(0, min(request.end, size) - request.start))
        except (OSError, InvalidCheckpoint) as error:
            logger.warning("cannot give weights: %s", error)
            raise Refused(f"{request.name!r} cannot be read here any more") from error

    def _place(self, request: ReadWeights) -> tuple[Path, int, int]:
        """The file, where what is asked for begins in it, and its size."""
        checkpoint, name = self._checkpoint, request.name
        manifest = checkpoint.manifest
        assert manifest is not None
        if request.is_file:
            path = checkpoint.file(name) if name in _ALWAYS or name in manifest.files else None
            if path is not None:
                return path, 0, path.stat().st_size
        else:
            found = checkpoint.stored(name) if name in manifest.tensors else None
            if found is not None:
                return found[0], found[1].start, found[1].nbytes
        raise Refused(f"{name!r} is not here")
