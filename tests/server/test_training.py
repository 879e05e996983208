"""Training calls over real sockets on loopback: the gradients of one process, bounded memory that is given
back, and a code for everything that is wrong.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petalite.client.remote_training import RemoteTraining
from petalite.client.settings import TrainingSettings as CallSettings
from petalite.errors import (
    BadAdapter,
    BadMessage,
    BadTensor,
    BatchTooLarge,
    Busy,
    DeadlineExceeded,
    NotFinite,
    NotKept,
    PetaliteError,
    ShuttingDown,
    UnknownAdapter,
    WrongModel,
    WrongSpan,
)
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.lora import names_of
from petalite.model.span import load_span
from petalite.net.host import Host
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.net.schema import decode, encode
from petalite.server.adapters import COPIES, Adapters
from petalite.server.backend import Backend
from petalite.server.training_calls import TrainingService
from petalite.server.training_memory import TrainingSettings
from petalite.swarm.codecs import CODECS
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER,
    ADAPTER_METHOD,
    BACKWARD_METHOD,
    FORWARD_METHOD,
    HIDDEN,
    PROMPTS,
    AdapterHeld,
    PutAdapter,
    SpanGradients,
    SpanInputs,
    TrainCall,
    TrainDone,
    adapter_digest,
    decode_rows,
    encode_rows,
    input_buffers,
    read_gradients,
)
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.lora import MODEL, adapter_of, blob_of, factors, linear_roles
from tests.helpers.waiting import until

F32 = CODECS["f32"]
SPAN = Span(1, 3)
ROWS, TOKENS, PROMPT_TOKENS = 4, 9, 3
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "bloom": {"model_type": "bloom"}}
TIGHT_TOKENS = {"llama": 900, "bloom": 600}  # of cache: room for a backward from inputs, and for no other
CALL = TrainCall(MODEL, SPAN.start, SPAN.end, ROWS, TOKENS, "f32")


class Serving:
    """One server's training service, a client that dials it, and the same blocks here."""

    def __init__(self, folder: Path, stack: AsyncExitStack, settings: TrainingSettings, cache_tokens: int):
        self.checkpoint = Checkpoint.open(folder)
        self.span = load_span(self.checkpoint, 1, 3)
        self.thread = ComputeThread()
        stack.callback(self.thread.close)
        self.backend = Backend(self.span, cache_tokens=cache_tokens, thread=self.thread)
        self.adapters = Adapters(settings.adapter_bytes)
        self._stack, self._settings = stack, settings

    async def listen(self) -> None:
        host = await self._stack.enter_async_context(Host(Identity.generate()))
        (self.address,) = await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        self.service = TrainingService(self.backend, MODEL, host, self.adapters, self._settings)
        self.client = await self._stack.enter_async_context(Host(Identity.generate()))

    @property
    def trainer(self) -> Any:
        return self.service.trainer

    async def call(
        self, method: str, request: Any, buffers: Any, timeout_s: float = 30.0, client: Any = None
    ):
        return await (client or self.client).call(
            self.address, method, encode(request), buffers, timeout_s=timeout_s
        )

    async def forward(self, inputs: SpanInputs, call: TrainCall = CALL) -> tuple[Tensor, TrainDone]:
        message = await self.call(FORWARD_METHOD, call, input_buffers(CODECS[call.codec], inputs))
        done = decode(TrainDone, message.body)
        shape = (call.rows, call.tokens, 64)
        return decode_rows(CODECS[done.codec], message.buffers[0], shape), done

    async def backward(
        self, inputs: SpanInputs | None, gradient: Tensor, call: TrainCall, adapter_values: int = 0
    ) -> SpanGradients:
        codec = CODECS[call.codec]
        buffers = [encode_rows(codec, gradient), *(input_buffers(codec, inputs) if inputs else [])]
        message = await self.call(BACKWARD_METHOD, call, buffers)
        done = decode(TrainDone, message.body)
        return read_gradients(call, done, message.buffers, 64, adapter_values)

    async def put(self, blob: bytes) -> bytes:
        digest = adapter_digest(blob)
        await self.call(ADAPTER_METHOD, PutAdapter(MODEL, digest), [blob])
        return digest

    def is_at_rest(self) -> bool:
        """Nothing is under way, nothing kept, and all memory given back."""
        return (
            not self.service.count
            and not self.trainer.memory.budget.reserved_bytes
            and not self.trainer.memory.kept_bytes
            and not self.backend.budget.reserved_bytes
        )


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), **FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def serving_of(
    folder: Path, stack: AsyncExitStack, cache_tokens: int = 20_000, **settings: Any
) -> Serving:
    serving = Serving(folder, stack, TrainingSettings(**settings), cache_tokens)
    await serving.listen()
    return serving


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN_STATES, GRADIENT = numbers(ROWS, TOKENS, 64), numbers(ROWS, TOKENS, 64, seed=1)
INPUTS = SpanInputs(HIDDEN_STATES)


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    """Within 1e-5 of the largest value."""
    assert actual is not None and expected is not None
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# -- what is right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["from inputs", "from what was kept", "without room for more than inputs"])
async def test_gradients_are_those_of_one_process(folder: Path, stack: AsyncExitStack, way: str) -> None:
    tight = way.startswith("without")
    family = Checkpoint.open(folder).config.family
    serving = await serving_of(folder, stack, TIGHT_TOKENS[family] if tight else 20_000)
    tensors = factors(serving.checkpoint, linear_roles(serving.checkpoint), range(1, 3))
    digest = await serving.put(blob_of(tensors))
    inputs = SpanInputs(HIDDEN_STATES, numbers(2, PROMPT_TOKENS, 64, seed=2), digest)
    call = replace(CALL, prompt_tokens=PROMPT_TOKENS, adapter=digest)

    leaves = [HIDDEN_STATES.clone(), inputs.prompts.clone()]  # type: ignore[union-attr]
    adapter = adapter_of(serving.checkpoint, tensors)
    trained = {name: tensor.requires_grad_() for name, tensor in adapter.tensors.items()}
    hidden, prompts = (leaf.requires_grad_() for leaf in leaves)
    expected = serving.span.forward_stateless(
        hidden, prompts=prompts, adapter=replace(adapter, tensors=trained)
    )
    expected.backward(GRADIENT)  # type: ignore[no-untyped-call]
    flat = torch.cat([trained[name].grad.flatten() for name in adapter.names(1, 3)])  # type: ignore[union-attr]

    output, done = await serving.forward(inputs, replace(call, keep=not way.startswith("from inputs")))
    close(output, expected.detach())
    assert (done.kept is not None) == (way == "from what was kept")
    call = replace(call, kept=done.kept, wants=(HIDDEN, PROMPTS, ADAPTER))
    found = await serving.backward(None if done.kept else inputs, GRADIENT, call, len(flat))
    close(found.hidden, hidden.grad)
    close(found.prompts, prompts.grad)
    close(found.adapter, flat)
    await until(serving.is_at_rest)


async def test_only_what_is_wanted_is_sent(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    inputs = SpanInputs(HIDDEN_STATES, numbers(2, PROMPT_TOKENS, 64, seed=2))
    call = replace(CALL, prompt_tokens=PROMPT_TOKENS, wants=(PROMPTS,))
    found = await serving.backward(inputs, GRADIENT, call)
    assert found.hidden is None
    assert found.prompts is not None and found.prompts.shape == (2, PROMPT_TOKENS, 64)
    assert found.report.compute_ms > 0


async def test_rounded_codecs_travel_too(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    exact, _ = await serving.forward(INPUTS)
    for name, tolerance in (("bf16", 0.03), ("q8", 0.1)):
        rounded, done = await serving.forward(INPUTS, replace(CALL, codec=name))
        assert done.codec == name
        assert float((rounded.float() - exact).abs().max()) < tolerance * float(exact.abs().max())


async def test_calls_beside_each_other_and_beside_a_session(llama: Path, stack: AsyncExitStack) -> None:
    """Eight calls of two peers while a session decodes: every result is what it would be alone."""
    serving = await serving_of(llama, stack)
    other = await stack.enter_async_context(Host(Identity.generate()))
    wanted = serving.span.forward_stateless(HIDDEN_STATES)
    rows = await serving.backend.open_rows(1, 40, 1, 3)
    buffers = input_buffers(F32, INPUTS)
    calls = [
        asyncio.create_task(serving.call(FORWARD_METHOD, CALL, buffers, client=client))
        for client in (serving.client, other)
        for _ in range(4)
    ]
    outputs = []
    for position in range(TOKENS):
        segment = Segment(rows.numbers[0], position, 1)
        output, _ = await serving.backend.step(HIDDEN_STATES[0, position : position + 1], [segment], 1, 3)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), wanted[0], rtol=1e-4, atol=1e-4)
    for message in await asyncio.gather(*calls):
        close(decode_rows(F32, message.buffers[0], (ROWS, TOKENS, 64)), wanted)
    serving.backend.drop_rows(rows)
    await until(serving.is_at_rest)


async def test_a_session_with_an_adapter_beside_one_without(folder: Path, stack: AsyncExitStack) -> None:
    """Two sessions share the adapter's passes, a third goes without; each gets what it would alone."""
    serving = await serving_of(folder, stack)
    adapter = adapter_of(serving.checkpoint, factors(serving.checkpoint, linear_roles(serving.checkpoint)))
    serving.adapters.put(adapter)
    adapted = serving.span.forward_stateless(HIDDEN_STATES, adapter=adapter)
    plain = serving.span.forward_stateless(HIDDEN_STATES)
    passes: list[tuple[int, bool]] = []
    forward = serving.span.forward

    def counting(packed: Tensor, segments: Any, cache: Any, **blocks: Any) -> Tensor:
        passes.append((len(segments), blocks["adapted"] is not None))
        return forward(packed, segments, cache, **blocks)

    serving.span.forward = counting  # type: ignore[method-assign]

    async def session(row: int, digest: bytes | None) -> Tensor:
        with serving.adapters.use(digest) as held:
            rows = await serving.backend.open_rows(1, TOKENS, 1, 3, adapter=held)
            outputs = []
            for position in range(TOKENS):
                fed = HIDDEN_STATES[row, position : position + 1]
                segment = Segment(rows.numbers[0], position, 1)
                output, _ = await serving.backend.step(fed, [segment], 1, 3, peer=row, adapter=rows.adapter)
                outputs.append(output)
            serving.backend.drop_rows(rows)
            return torch.cat(outputs)

    found = await asyncio.gather(session(0, adapter.digest), session(1, adapter.digest), session(2, None))
    for output, expected in zip(found, (adapted[0], adapted[1], plain[2]), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert (2, True) in passes
    assert all(n_rows == 1 for n_rows, with_adapter in passes if not with_adapter)


# -- bounds ----------------------------------------------------------------------------------------------


async def test_a_batch_too_large_says_what_fits(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack, most_tokens=30)
    with pytest.raises(BatchTooLarge, match="at most 30 tokens") as caught:
        await serving.forward(INPUTS)
    assert caught.value.most_tokens == 27  # three whole rows of nine
    await serving.forward(SpanInputs(HIDDEN_STATES[:3]), replace(CALL, rows=3))
    assert serving.trainer.memory.most_tokens == 30


async def test_a_batch_larger_than_memory_says_what_fits(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack, 1200)
    many = numbers(64, TOKENS, 64)
    call = replace(CALL, rows=64)
    with pytest.raises(BatchTooLarge) as caught:
        await serving.forward(SpanInputs(many), call)
    most = caught.value.most_tokens
    assert most is not None and 0 < most < 64 * TOKENS and most % TOKENS == 0
    n_rows = most // TOKENS
    fits = replace(call, rows=n_rows, wants=(HIDDEN,))
    await serving.backward(SpanInputs(many[:n_rows]), many[:n_rows], fits)
    assert serving.is_at_rest()


async def test_no_training_where_none_is_wanted(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack, share=0.0)
    assert serving.trainer.memory.most_tokens == 0
    with pytest.raises(BatchTooLarge) as caught:
        await serving.forward(INPUTS)
    assert caught.value.most_tokens is None


async def test_calls_wait_for_memory_and_then_are_told_when_to_come_back(
    llama: Path, stack: AsyncExitStack
) -> None:
    serving = await serving_of(llama, stack, longest_wait_s=0.05)
    held = serving.trainer.memory.budget.free_bytes
    await serving.trainer.memory.budget.reserve(held, 0)
    with pytest.raises(Busy) as caught:
        await serving.forward(INPUTS)
    assert caught.value.retry_after_s is not None
    serving.trainer.memory.budget.release(held)
    await serving.forward(INPUTS)


async def test_one_peer_has_so_many_calls_at_once(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack, most_per_peer=2)
    buffers = input_buffers(F32, INPUTS)
    ended = await asyncio.gather(
        *(serving.call(FORWARD_METHOD, CALL, buffers) for _ in range(6)), return_exceptions=True
    )
    assert {type(one) for one in ended if isinstance(one, BaseException)} == {Busy}
    assert sum(not isinstance(one, BaseException) for one in ended) >= 2


async def test_calls_that_wait_have_brought_no_more_than_is_allowed(
    llama: Path, stack: AsyncExitStack
) -> None:
    """Inputs are in memory before there is room to compute with them."""
    buffers = input_buffers(F32, INPUTS)
    serving = await serving_of(llama, stack, calls_bytes=2 * sum(map(len, buffers)))
    held = serving.trainer.memory.budget.free_bytes
    await serving.trainer.memory.budget.reserve(held, 0)
    calls = [asyncio.create_task(serving.call(FORWARD_METHOD, CALL, buffers)) for _ in range(4)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    await until(lambda: sum(call.done() for call in calls) == 2)
    serving.trainer.memory.budget.release(held)
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(one, Busy) for one in ended) == 2
    assert serving.is_at_rest()
    await serving.forward(INPUTS)


async def test_what_is_kept_gives_way_to_sessions(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    _, done = await serving.forward(INPUTS, replace(CALL, keep=True))
    assert done.kept is not None
    assert serving.backend.budget.reserved_bytes > 0
    rows = await serving.backend.open_rows(1, 20_000, 1, 3)  # all there is
    with pytest.raises(NotKept):
        await serving.backward(None, GRADIENT, replace(CALL, kept=done.kept, wants=(HIDDEN,)))
    serving.backend.drop_rows(rows)
    assert serving.is_at_rest()


async def test_what_is_kept_is_let_go_of_in_time(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack, kept_s=0.01)
    _, done = await serving.forward(INPUTS, replace(CALL, keep=True))
    assert done.kept is not None
    await until(serving.is_at_rest)
    with pytest.raises(NotKept):
        await serving.backward(None, GRADIENT, replace(CALL, kept=done.kept, wants=(HIDDEN,)))


async def test_what_is_kept_is_its_own_peers_and_serves_once(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    stranger = await stack.enter_async_context(Host(Identity.generate()))
    _, done = await serving.forward(INPUTS, replace(CALL, keep=True))
    back = replace(CALL, kept=done.kept, wants=(HIDDEN,))
    with pytest.raises(NotKept):
        await serving.call(BACKWARD_METHOD, back, [encode_rows(F32, GRADIENT)], client=stranger)
    with pytest.raises(NotKept):
        await serving.backward(None, GRADIENT, replace(back, end=2))
    with pytest.raises(BadMessage):
        await serving.backward(None, GRADIENT, replace(back, wants=(PROMPTS,)))
    with pytest.raises(BadMessage):
        await serving.backward(None, GRADIENT[:2], replace(back, rows=2))
    await serving.backward(None, GRADIENT, back)
    with pytest.raises(NotKept):
        await serving.backward(None, GRADIENT, back)
    assert serving.is_at_rest()


async def test_a_client_that_gives_up_leaves_nothing(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    task = asyncio.create_task(serving.call(FORWARD_METHOD, CALL, input_buffers(F32, INPUTS)))
    await until(lambda: serving.service.count)
    task.cancel()
    await until(serving.is_at_rest)
    await serving.forward(INPUTS)


async def test_a_deadline_ends_a_call(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    released = threading.Event()
    serving.thread.run(released.wait)
    with pytest.raises(DeadlineExceeded):
        await serving.call(FORWARD_METHOD, CALL, input_buffers(F32, INPUTS), timeout_s=0.2)
    released.set()
    await until(serving.is_at_rest)


# -- leaving ---------------------------------------------------------------------------------------------


async def test_draining_lets_calls_end_and_refuses_new_ones(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    call = asyncio.create_task(serving.forward(INPUTS, replace(CALL, keep=True)))
    await until(lambda: serving.service.count)
    await serving.service.drain(20)
    await call
    with pytest.raises(ShuttingDown):
        await serving.forward(INPUTS)
    serving.service.suspend()
    assert not serving.backend.budget.reserved_bytes
    with pytest.raises(ShuttingDown):
        await serving.forward(INPUTS)
    serving.service.resume(serving.backend)
    await serving.forward(INPUTS)


async def test_draining_cuts_what_takes_too_long(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    released = threading.Event()
    serving.thread.run(released.wait)
    call = asyncio.create_task(serving.forward(INPUTS))
    await until(lambda: serving.service.count)
    draining = asyncio.create_task(serving.service.drain(0.01))
    with pytest.raises(ShuttingDown):
        await call
    released.set()
    await draining
    await until(serving.is_at_rest)


# -- adapters --------------------------------------------------------------------------------------------


async def test_an_adapter_is_known_by_its_digest(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    blob = blob_of(factors(serving.checkpoint, ("query",)))
    call = replace(CALL, adapter=adapter_digest(blob))
    with pytest.raises(UnknownAdapter):
        await serving.forward(SpanInputs(HIDDEN_STATES, None, call.adapter), call)
    await serving.put(blob)
    await serving.put(blob)
    await serving.forward(SpanInputs(HIDDEN_STATES, None, call.adapter), call)
    with pytest.raises(BadAdapter, match="digest"):
        await serving.call(ADAPTER_METHOD, PutAdapter(MODEL, bytes(32)), [blob])


async def test_an_adapter_comes_in_pieces(
    llama: Path, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("petalite.server.training_calls", "petalite.client.remote_training"):
        monkeypatch.setattr(f"{module}.ADAPTER_PIECE_BYTES", 1000)
    monkeypatch.setattr("petalite.server.training_calls.ADAPTER_PIECE_S", 0.2)
    serving = await serving_of(llama, stack)
    blob = blob_of(factors(serving.checkpoint, ("query",)))
    digest = adapter_digest(blob)
    assert len(blob) > 5000
    peer = serving.address.peer_id
    assert peer is not None
    serving.client.book.add(peer, [serving.address])
    place = RemoteTraining(serving.client, peer, MODEL, CallSettings())
    for put, expected in (
        (PutAdapter(MODEL, digest, len(blob)), [bytes(1001)]),
        (PutAdapter(MODEL, digest, len(blob)), [bytes(999)]),
        (PutAdapter(MODEL, digest, len(blob)), []),
        (PutAdapter(MODEL, digest, len(blob)), [b"", b""]),
    ):
        async with await serving.client.open(serving.address, ADAPTER_METHOD, encode(put), [b""]) as call:
            first = await call.receive()
            assert first is not None and decode(AdapterHeld, first.body) == AdapterHeld(digest, len(blob))
            await call.send({}, expected)
            with pytest.raises(BadMessage):
                await call.receive()
    async with await serving.client.open(serving.address, ADAPTER_METHOD, encode(put), [b""]) as call:
        await call.receive()
        with pytest.raises(DeadlineExceeded):
            await call.receive()
    with pytest.raises(BadAdapter, match="takes"):
        await serving.call(ADAPTER_METHOD, PutAdapter(MODEL, digest, 1 << 40), [b""])
    assert digest not in serving.adapters
    await place.put_adapter(blob, ask=True)
    assert digest in serving.adapters
    await place.put_adapter(blob)
    assert serving.is_at_rest()


async def test_the_longest_unused_adapter_goes_and_one_in_use_stays(
    llama: Path, stack: AsyncExitStack
) -> None:
    checkpoint = Checkpoint.open(llama)
    one = adapter_of(checkpoint, factors(checkpoint, ("query",)))
    serving = await serving_of(llama, stack, adapter_bytes=2 * COPIES * one.nbytes)  # room for two
    blobs = [blob_of(factors(checkpoint, ("query",), seed=seed)) for seed in range(3)]
    digests = [await serving.put(blob) for blob in blobs[:2]]
    with serving.adapters.use(digests[0]):
        digests.append(await serving.put(blobs[2]))
        assert [digest in serving.adapters for digest in digests] == [True, False, True]
        with serving.adapters.use(digests[2]), pytest.raises(Busy):
            await serving.put(blobs[1])
    await serving.put(blobs[1])
    assert serving.adapters.sent_bytes <= serving.adapters.limit_bytes


async def test_a_flood_of_adapters_drives_out_its_senders_own(llama: Path, stack: AsyncExitStack) -> None:
    checkpoint = Checkpoint.open(llama)
    adapters = [adapter_of(checkpoint, factors(checkpoint, ("query",), seed=seed)) for seed in range(8)]
    held = Adapters(4 * COPIES * adapters[0].nbytes)
    held.put(adapters[0], "modest")
    for adapter in adapters[1:]:
        held.put(adapter, "greedy")
    assert [adapter.digest in held for adapter in adapters] == [True] + [False] * 4 + [True] * 3


async def test_adapters_that_do_not_fit_are_refused(llama: Path, stack: AsyncExitStack) -> None:
    checkpoint = Checkpoint.open(llama)
    fits = factors(checkpoint, ("query",))
    serving = await serving_of(llama, stack, adapter_bytes=60_000)
    a, b = names_of(0, "query")
    wrong = {
        "over the limit": blob_of(factors(checkpoint, linear_roles(checkpoint))),
        "another target": blob_of(fits | {"blocks.0.head.lora_A": torch.zeros(3, 64)}),
        "another block": blob_of({names_of(7, "query")[0]: fits[a], names_of(7, "query")[1]: fits[b]}),
        "another width": blob_of(fits | {a: torch.zeros(3, 32)}),
        "two ranks": blob_of(fits | {a: torch.zeros(4, 64)}),
        "NaN": blob_of(fits | {a: torch.full((3, 64), math.nan)}),
        "no file": b"x" * 1000,
    }
    for what, blob in wrong.items():
        with pytest.raises(BadAdapter):
            await serving.put(blob)
        assert adapter_digest(blob) not in serving.adapters, what
    with pytest.raises(WrongModel):
        await serving.put(blob_of(fits, model="other@1"))
    assert serving.adapters.sent_bytes == 0


# -- what is wrong ---------------------------------------------------------------------------------------

GOOD = input_buffers(F32, INPUTS)
NAN = HIDDEN_STATES.clone()
NAN[1, 2, 3] = math.nan
FORWARD_ATTACKS: dict[str, tuple[TrainCall, list[Any], type[PetaliteError]]] = {
    "another model": (replace(CALL, model_id="x"), GOOD, WrongModel),
    "blocks before ours": (replace(CALL, start=0), GOOD, WrongSpan),
    "blocks after ours": (replace(CALL, end=4), GOOD, WrongSpan),
    "no blocks": (replace(CALL, start=2, end=2), GOOD, WrongSpan),
    "blocks backwards": (replace(CALL, start=3, end=1), GOOD, WrongSpan),
    "no buffer": (CALL, [], BadMessage),
    "one more buffer": (CALL, [*GOOD, b"x"], BadMessage),
    "prompts that are not there": (replace(CALL, prompt_tokens=1), GOOD, BadMessage),
    "prompts of another length": (replace(CALL, prompt_tokens=2), [*GOOD, bytes(64 * 4)], BadTensor),
    "more prompts than tokens": (replace(CALL, prompt_tokens=TOKENS + 1), GOOD, BadMessage),
    "fewer rows than named": (replace(CALL, rows=ROWS + 1), GOOD, BadTensor),
    "more rows than named": (replace(CALL, rows=ROWS - 1), GOOD, BadTensor),
    "half a value": (CALL, [GOOD[0][:-1]], BadTensor),
    "an unknown codec": (replace(CALL, codec="f64"), GOOD, BadTensor),
    "no rows": (replace(CALL, rows=0), GOOD, BadMessage),
    "rows without end": (replace(CALL, rows=1 << 60), GOOD, BadMessage),
    "tokens by tokens": (replace(CALL, rows=1 << 16, tokens=1 << 16), GOOD, BatchTooLarge),
    "an unknown adapter": (replace(CALL, adapter=bytes(32)), GOOD, UnknownAdapter),
    "a digest of another length": (replace(CALL, adapter=b"x"), GOOD, BadMessage),
    "NaN": (CALL, input_buffers(F32, SpanInputs(NAN)), NotFinite),
}
BACK = replace(CALL, wants=(HIDDEN,))
BACKWARD_ATTACKS: dict[str, tuple[TrainCall, list[Any], type[PetaliteError]]] = {
    "no gradient": (BACK, [], BadMessage),
    "no inputs": (BACK, GOOD, BadMessage),
    "a gradient of another shape": (BACK, [GOOD[0][: 64 * 4], *GOOD], BadTensor),
    "inputs of another shape": (BACK, [*GOOD, GOOD[0][: 64 * 4]], BadTensor),
    "nothing is wanted": (CALL, GOOD * 2, BadMessage),
    "something unknown is wanted": (replace(CALL, wants=("weights",)), GOOD * 2, BadMessage),
    "the same twice": (replace(CALL, wants=(HIDDEN, HIDDEN)), GOOD * 2, BadMessage),
    "prompts' without prompts": (replace(CALL, wants=(PROMPTS,)), GOOD * 2, BadMessage),
    "an adapter's without one": (replace(CALL, wants=(ADAPTER,)), GOOD * 2, BadMessage),
    "what nobody kept": (replace(BACK, kept=bytes(16)), GOOD, NotKept),
    "kept, and inputs": (replace(BACK, kept=bytes(16)), GOOD * 2, BadMessage),
    "NaN in the gradient": (BACK, [encode_rows(F32, NAN), *GOOD], NotFinite),
    "NaN in the inputs": (BACK, [*GOOD, encode_rows(F32, NAN)], NotFinite),
}


@pytest.mark.parametrize("method", [FORWARD_METHOD, BACKWARD_METHOD])
async def test_everything_wrong_is_refused_with_a_code_and_leaves_nothing(
    llama: Path, stack: AsyncExitStack, method: str
) -> None:
    serving = await serving_of(llama, stack)
    attacks = FORWARD_ATTACKS if method == FORWARD_METHOD else BACKWARD_ATTACKS
    for what, (call, buffers, error) in attacks.items():
        with pytest.raises(error):
            await serving.call(method, call, buffers)
            pytest.fail(what)
        await until(serving.is_at_rest)
    good = serving.span.forward_stateless(HIDDEN_STATES)
    output, _ = await serving.forward(INPUTS)
    close(output, good)


async def test_nan_is_named_by_who_made_it(llama: Path, stack: AsyncExitStack) -> None:
    serving = await serving_of(llama, stack)
    with pytest.raises(NotFinite, match="1:3 were given") as caught:
        await serving.forward(SpanInputs(NAN))
    assert caught.value.given is True
    with pytest.raises(NotFinite, match="1:3 were given") as caught:
        await serving.backward(INPUTS, NAN, BACK)
    assert caught.value.given is True
    huge = torch.full_like(GRADIENT, 3e38)  # finite, and its gradient is not
    with pytest.raises(NotFinite, match="made NaN or Inf in their gradients") as caught:
        await serving.backward(INPUTS, huge, BACK)
    assert caught.value.given is False
