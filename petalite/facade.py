"""`petalite.load`: a model for scripts and notebooks, in a swarm or in this process."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack

from petalite.client.loops import LoopThread
from petalite.client.model import AsyncDistributedModel
from petalite.client.settings import Routing, SessionSettings, TrainingSettings
from petalite.client.swarm import Swarm
from petalite.client.sync import DistributedModel
from petalite.embedded import open_embedded
from petalite.errors import InvalidArgument
from petalite.model.dtypes import AUTO
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr


def load(
    path_or_repo: str,
    *,
    peers: Iterable[str | Multiaddr] | None = None,
    dtype: str | None = None,
    swarm_key: bytes | None = None,
    lan: bool = False,
    identity: Identity | None = None,
    name: str | None = None,
    settings: SessionSettings = SessionSettings(),
    routing: Routing = Routing(),
    training: TrainingSettings = TrainingSettings(),
    threads: int | None = None,
) -> DistributedModel:
    """A model from a folder or hub repository, its blocks served by the swarm that `peers` belong to.

    `peers` are addresses as nodes print them; `lan` looks for peers on the local network (it needs the
    extra `lan`); with neither, every block runs in this process. `dtype` is what is computed here
    ("float32", "bfloat16"), by default what the checkpoint was saved in. `name` is the model's name in the
    swarm where it is not the folder's. `routing` chooses ring or star, and whom to use; `settings` are of
    sessions, `training` of passes over batches. `threads` of tensor work here, at most and by default one for
    each core. Raises UserError's kinds for what cannot be loaded and Unreachable, naming every address, when
    no peer answers.
    """
    alone = peers is None and not lan
    if alone and (swarm_key is not None or identity is not None or name is not None):
        raise InvalidArgument("swarm_key, identity and name are for a swarm; give peers as well")
    swarm = None if alone else Swarm(peers or (), identity=identity, swarm_key=swarm_key, lan=lan)
    loop = LoopThread()
    try:
        opening = _open(path_or_repo, swarm, dtype or AUTO, name, settings, routing, training, threads)
        model, closing = loop.run(opening)
    except BaseException:
        loop.close()
        raise
    return DistributedModel(model, loop, closing)


async def _open(
    path_or_repo: str,
    swarm: Swarm | None,
    dtype: str,
    name: str | None,
    settings: SessionSettings,
    routing: Routing,
    training: TrainingSettings,
    threads: int | None,
) -> tuple[AsyncDistributedModel, AsyncExitStack]:
    async with AsyncExitStack() as stack:
        if swarm is None:
            model = await open_embedded(
                path_or_repo, dtype=dtype, settings=settings, training=training, threads=threads
            )
            await stack.enter_async_context(model)
        else:
            await stack.enter_async_context(swarm)
            model = await swarm.model(
                path_or_repo,
                name=name,
                dtype=dtype,
                settings=settings,
                routing=routing,
                training=training,
                threads=threads,
            )
        return model, stack.pop_all()
