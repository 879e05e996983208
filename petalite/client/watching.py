"""Whether a replay gets anywhere: judged by signs of progress, as nobody knows how fast its servers are.

They may be slower than those they replace, and be right all the same: so what was learnt of steps says
nothing here. What shows is that answers come, that bytes move, or that a server which is asked has got
further.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from petalite.client.stages import Stage, StageFailed
from petalite.errors import DeadlineExceeded, NetworkError, RemoteError
from petalite.swarm.messages import Progress

T = TypeVar("T")

LOOK_S = 2.0  # between looks for signs; a replay that is over sooner costs none
QUIET_S = 8.0  # a replay without a sign for so long is stuck: a server's passes take a tenth of a second
PROBE_S = 2.0  # for a stage to say how far it is


async def watched(stages: Sequence[Stage], replay: Coroutine[Any, Any, T], longest_s: float) -> T:
    """What `replay` through these stages gives. Raises StageFailed, also of the one that it is stuck at, or
    is at after `longest_s`.
    """
    task = asyncio.create_task(replay)
    clock = asyncio.get_running_loop().time
    began_s = moved_s = clock()
    said: list[Progress | None] = [None] * len(stages)
    seen: object = None
    try:
        while not (await asyncio.wait((task,), timeout=LOOK_S))[0]:
            news = await asyncio.gather(*map(_look, stages))
            said = [new or old for new, old in zip(news, said, strict=True)]
            signs = said, [(stage.heard, stage.opened.traffic) for stage in stages]
            if signs != seen:
                seen, moved_s = signs, clock()
            if clock() - moved_s >= QUIET_S or clock() - began_s >= longest_s:
                raise _stuck(stages, said, clock() - moved_s)
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def probe(stage: Stage) -> Progress | None:
    """How far it is; None where it does not say so in time."""
    try:
        async with asyncio.timeout(PROBE_S):
            return await stage.opened.probe()
    except (NetworkError, RemoteError, TimeoutError):
        return None


async def _look(stage: Stage) -> Progress | None:
    """Behind what has not left yet a question would wait, and to give it up would end the session there."""
    return await probe(stage) if stage.opened.traffic[0] == 0 else None


def _stuck(stages: Sequence[Stage], said: Sequence[Progress | None], quiet_s: float) -> StageFailed:
    """The last that says nothing, or has something to pass on or to answer, as those before it may wait for
    it; where nobody has, something was lost on the way between two.
    """
    late = DeadlineExceeded(f"a replay came no further for {quiet_s:.0f} s")
    culprit = None
    for stage, at in zip(stages, said, strict=True):
        pushes = stage.pushes_to is not None and stage is not stages[-1]
        if at is None or max(at.received, stage.asked) > (at.sent if pushes else stage.heard):
            culprit = stage
    if culprit is None:
        for before, stage, sent, come in zip(stages, stages[1:], said, said[1:], strict=False):
            if before.pushes_to is stage and sent and come and come.received < sent.sent:
                return cut_off(before, stage, late)
        culprit = stages[-1]
    culprit.lost(late)
    return StageFailed(culprit, late)


def cut_off(before: Stage, stage: Stage, late: DeadlineExceeded) -> StageFailed:
    """What one passed on does not reach the other; nobody knows who is to blame."""
    before.link_down(before.epoch, f"nothing of {before.peer.short()} reaches {stage.peer.short()}")
    return StageFailed(stage, stage.error or late)
