"""The ring at one server: who may feed a session, what becomes of what it pushes on, and peers that lie."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from petalite.errors import BadMessage, Cancelled, ConnectionLost, Refused, ResourceLimit
from petalite.net.credit import Windows
from petalite.net.identity import Identity
from petalite.net.rpc import Call
from petalite.net.schema import encode
from petalite.server.local import LocalEdge
from petalite.server.session import INBOX_STEPS
from petalite.server.sessions import SessionSettings
from petalite.swarm.messages import (
    ATTACH_METHOD,
    Attach,
    Expect,
    LinkDown,
    Probe,
    Progress,
    Relink,
    Step,
    StepDone,
    Successor,
    write,
)
from tests.helpers.waiting import until
from tests.server.serving import F32, OPEN, Serving, heard, hidden, step

TOKEN = bytes(range(16))


async def test_a_predecessor_with_the_token_feeds_the_session(serving: Serving) -> None:
    """Its steps are answered to the client; the token opens once."""
    client, before = await serving.client(), await serving.client()
    call = await serving.open(client, replace(OPEN, token=TOKEN))
    pushing = await before.open(serving.address, ATTACH_METHOD, encode(Attach(TOKEN)))
    states = hidden(serving.span, 3)
    await pushing.send(write(Step(((0, 0, 3),), "f32", 4, number=7, epoch=1)), [F32.encode(states)])
    done, buffers = await heard(call)
    assert isinstance(done, StepDone)
    assert (done.number, done.epoch, len(done.hops)) == (7, 1, 1)
    assert done.hops[0].nbytes == 3 * 64 * 4
    assert done.hops[0].compute_ms > 0
    direct = await step(await serving.open(client), states, (0, 0, 3))
    assert torch.equal(F32.decode(buffers[0], states.shape[1]), direct)
    await call.send(write(Probe()))
    assert (await heard(call))[0] == Progress(7, 7, held=3)
    again = await before.open(serving.address, ATTACH_METHOD, encode(Attach(TOKEN)))
    with pytest.raises(Refused):
        await again.receive()


async def test_a_new_predecessor_takes_the_place_of_the_old(serving: Serving) -> None:
    client, before, after = [await serving.client() for _ in range(3)]
    call = await serving.open(client, replace(OPEN, token=TOKEN))
    old = await before.open(serving.address, ATTACH_METHOD, encode(Attach(TOKEN)))
    states = hidden(serving.span, 1)
    await old.send(write(Step(((0, 0, 1),), "f32", 4, number=1)), [F32.encode(states)])
    await heard(call)
    other = bytes(16)
    await call.send(write(Expect(other, epoch=3)))
    new = await after.open(serving.address, ATTACH_METHOD, encode(Attach(other)))
    await new.send(write(Step(((0, 1, 1),), "f32", 4, number=2, epoch=3)), [F32.encode(states)])
    done, _ = await heard(call)
    assert isinstance(done, StepDone)
    assert done.number == 2
    with pytest.raises(Cancelled):
        await old.receive()


async def test_what_is_pushed_on_is_kept_and_returns_on_request(serving: Serving) -> None:
    """To a successor that cannot be reached: the client is told, and can have the inputs back."""
    client = await serving.client()
    stranger = Successor(Identity.generate().peer_id, TOKEN)
    call = await serving.open(client, replace(OPEN, rows=1, successor=stranger))
    said, _ = await heard(call)
    assert isinstance(said, LinkDown)
    assert stranger.peer.short() in said.reason
    states = hidden(serving.span, 3)
    await call.send(write(Step(((0, 0, 3),), "f32", 5, number=1, epoch=1)), [F32.encode(states)])
    said, _ = await heard(call)
    assert said == LinkDown(1, "the session was told of no successor")
    token_bytes = 4 * serving.span.config.hidden_size
    assert serving.service.kept_bytes == 3 * token_bytes
    await call.send(write(Relink(None, number=9, epoch=2, stop=4, lengths=(2,))))
    done, buffers = await heard(call)
    assert isinstance(done, StepDone)
    assert (done.rows, done.number, done.epoch) == (((0, 0, 2),), 9, 2)
    direct = await step(await serving.open(client, replace(OPEN, rows=1)), states, (0, 0, 3))
    assert torch.equal(F32.decode(buffers[0], states.shape[1]), direct[:2])
    call.end()


async def test_a_step_of_an_older_epoch_is_dropped(serving: Serving) -> None:
    """It was sent before a repair; the row stays as the newer epoch's steps made it."""
    call = await serving.open(await serving.client())
    states = F32.encode(hidden(serving.span, 1))
    for number, position, epoch in ((1, 0, 5), (2, 0, 3), (3, 1, 5)):
        await call.send(write(Step(((0, position, 1),), "f32", 4, number=number, epoch=epoch)), [states])
    done = [(await heard(call))[0] for _ in range(2)]
    assert [(one.number, one.epoch) for one in done if isinstance(one, StepDone)] == [(1, 5), (3, 5)]
    call.end()
    await serving.until_free()


async def test_a_session_without_a_successor_gets_none_later(serving: Serving) -> None:
    """What it would keep of what it pushes is in nobody's budget."""
    call = await serving.open(await serving.client())
    await call.send(write(Relink(Successor(serving.host.peer_id, TOKEN), 1, 1, 5, (0,))))
    with pytest.raises(BadMessage, match="without a successor"):
        await call.receive()
    await serving.until_free()


async def test_a_client_that_relinks_without_end_is_cut(serving: Serving) -> None:
    """Its worker is busy with the first; what waits behind it is bounded."""
    client = await serving.client()
    bystander = await serving.open(client)
    call = await serving.open(client, replace(OPEN, rows=1, successor=Successor(client.peer_id, TOKEN)))
    with pytest.raises((ResourceLimit, Cancelled)):
        for number in range(100_000):
            await call.send(write(Relink(Successor(client.peer_id, TOKEN), number, 1, 5, (0,))))
    await step(bystander, hidden(serving.span, 3), (0, 0, 3))
    bystander.end()
    await serving.until_free()


async def test_a_client_that_expects_without_end_leaves_one_token(serving: Serving) -> None:
    call = await serving.open(await serving.client())
    for number in range(100):
        await call.send(write(Expect(number.to_bytes(16, "big"), epoch=1)))
    await call.send(write(Probe()))
    await heard(call)
    assert len(serving.service._doors._expected) == 1
    call.end()
    await until(lambda: not serving.service._doors._expected)


async def test_a_token_of_nobody_is_refused(serving: Serving) -> None:
    stranger = await (await serving.client()).open(serving.address, ATTACH_METHOD, encode(Attach(TOKEN)))
    with pytest.raises(Refused):
        await stranger.receive()


async def test_a_successor_that_is_not_who_it_says(serving: Serving) -> None:
    """Somebody else answers at its address: the client is told, and nothing was pushed to the stranger."""
    client, stranger = await serving.client(), await serving.client()
    (address,) = await stranger.listen([replace(serving.address, port=0, peer_id=None)])
    attached: list[Attach] = []

    async def attach(call: Call, request: Attach) -> None:
        attached.append(request)

    stranger.serve(ATTACH_METHOD, attach, request=Attach)
    claimed = Identity.generate().peer_id
    serving.known[claimed] = replace(address, peer_id=claimed)
    call = await serving.open(client, replace(OPEN, rows=1, successor=Successor(claimed, TOKEN)))
    said, _ = await heard(call)
    assert isinstance(said, LinkDown)
    assert not attached
    call.end()
    await serving.until_free()


async def test_a_successor_that_knows_no_such_token(serving: Serving) -> None:
    """It refuses the attachment; the client hears of it once steps are pushed."""
    client, other = await serving.client(), await serving.client()
    (address,) = await other.listen([replace(serving.address, port=0, peer_id=None)])
    serving.known[other.peer_id] = address
    call = await serving.open(client, replace(OPEN, rows=1, successor=Successor(other.peer_id, TOKEN)))
    states = [F32.encode(hidden(serving.span, 3))]
    waiting = asyncio.create_task(heard(call))
    while not waiting.done():
        await call.send(write(Step(((0, 0, 3),), "f32", 5)), states)
        await asyncio.wait([waiting], timeout=0.05)
    said, _ = waiting.result()
    assert isinstance(said, LinkDown)
    call.end()
    await serving.until_free()


@pytest.mark.parametrize("serving", [SessionSettings(idle_s=0.3)], indirect=True)
async def test_a_successor_that_never_reads_is_given_up(serving: Serving) -> None:
    client, deaf = await serving.client(), await serving.client(Windows(stream_bytes=4096))
    (address,) = await deaf.listen([replace(serving.address, port=0, peer_id=None)])

    async def attach(call: Call, request: Attach) -> None:
        await asyncio.Event().wait()

    deaf.serve(ATTACH_METHOD, attach, request=Attach)
    serving.known[deaf.peer_id] = address
    call = await serving.open(client, replace(OPEN, rows=1, successor=Successor(deaf.peer_id, TOKEN)))
    for _ in range(4):
        await call.send(write(Step(((0, 0, 16),), "f32", 5)), [F32.encode(hidden(serving.span, 16))])
    said, _ = await heard(call)
    assert isinstance(said, LinkDown)
    call.end()
    await serving.until_free()


async def test_a_push_within_the_process_ends_with_the_session_it_waits_for(serving: Serving) -> None:
    """The session is full and computes nothing more; when its client goes, whoever pushes to it hears so."""
    call = await serving.open(await serving.client())
    (session,) = serving.service._sessions
    assert session is not None
    edge = LocalEdge(session)
    wrong_epoch = Step(((0, 0, 1),), "f32", 4)
    serving.backend.step = lambda *args, **kwargs: asyncio.Event().wait()  # type: ignore[method-assign, assignment, return-value]
    states = [F32.encode(hidden(serving.span, 1))]
    for _ in range(INBOX_STEPS + 1):
        await edge.send(write(wrong_epoch), states)
        await asyncio.sleep(0)
    waiting = asyncio.create_task(edge.send(write(wrong_epoch), states))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    call.end()
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(ConnectionLost):
        await edge.send(write(wrong_epoch), states)
    await until(lambda: not serving.service.count)


async def test_nobody_feeds_a_session_that_is_over(serving: Serving) -> None:
    """As one whose door was opened in the moment in which it ended: what came would count for ever."""
    call = await serving.open(await serving.client())
    (session,) = serving.service._sessions
    call.end()
    await serving.until_free()
    with pytest.raises(ConnectionLost):
        LocalEdge(session)


async def test_a_push_within_the_process_can_be_given_up(serving: Serving) -> None:
    call = await serving.open(await serving.client())
    (session,) = serving.service._sessions
    assert session is not None
    edge = LocalEdge(session)
    serving.backend.step = lambda *args, **kwargs: asyncio.Event().wait()  # type: ignore[method-assign, assignment, return-value]
    body, states = write(Step(((0, 0, 1),), "f32", 4)), [F32.encode(hidden(serving.span, 1))]
    for _ in range(INBOX_STEPS + 1):
        await edge.send(body, states)
        await asyncio.sleep(0)
    waiting = asyncio.create_task(edge.send(body, states))
    await asyncio.sleep(0.01)
    edge.cancel()
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(waiting, 10)
    call.end()
