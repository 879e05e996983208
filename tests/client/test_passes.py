"""Passes over toy servers in virtual time: whoever fails, at whatever call, the outputs and gradients are
those of the same blocks in one piece of torch, and what cannot be computed is said by name.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from petalite.client.adapters import HostedAdapter, OwnAdapter
from petalite.client.passes import Gradients, Passes, Wants
from petalite.client.settings import TrainingSettings
from petalite.client.spancalls import Work
from petalite.errors import (
    BadTensor,
    BatchTooLarge,
    Busy,
    DeadlineExceeded,
    MissingBlocks,
    NotFinite,
    ShuttingDown,
    UnknownAdapter,
)
from petalite.net.identity import PeerId
from petalite.sim import loop
from petalite.swarm.spans import Span
from tests.client.toy_training import COMPUTE_S, MODEL_ID, E, ToyServer, ToySwarm, peer, reference

T = TypeVar("T")
WHOLE = Span(0, 6)
CHAIN = {1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6)}
# For each of the chain a replacement; the middle one's is two servers.
SPANS = CHAIN | {4: Span(0, 2), 5: Span(2, 3), 6: Span(3, 4), 7: Span(4, 6)}
QUICK = TrainingSettings(part_tokens=6, in_flight=4, call_s=30.0, recovery_s=60.0)
ALL = Wants(hidden=True, prompts=True, adapter=True)
ROWS, TOKENS, PROMPTS, RANK, ALPHA = 6, 3, 2, 2, 3.0


def run(main: Coroutine[Any, Any, T]) -> T:
    random.seed(0)
    return loop.run(main)


def given() -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """hidden, prompts, a LoRA on every second block, and the outputs' gradient."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lora = {}
    for block in (0, 2, 3, 5):
        lora[f"blocks.{block}.mix.lora_A"] = randn(RANK, E)
        lora[f"blocks.{block}.mix.lora_B"] = randn(E, RANK)
    return randn(ROWS, TOKENS, E), randn(len(WHOLE), PROMPTS, E), lora, randn(ROWS, TOKENS, E)


def work_of(prompts: Tensor | None, lora: dict[str, Tensor] | None) -> Work:
    return Work(WHOLE, prompts, None if lora is None else OwnAdapter(MODEL_ID, ALPHA, lora))


async def step(
    swarm: ToySwarm, settings: TrainingSettings = QUICK, between: Callable[[], None] = lambda: None
) -> tuple[Tensor, Gradients]:
    """Forward and backward of everything there is."""
    hidden, prompts, lora, gradient = given()
    passes, work = Passes(swarm, settings), work_of(prompts, lora)
    output, pieces = await passes.forward(work, hidden, ALL)
    between()
    return output, await passes.backward(work, pieces, gradient, ALL)


def check(output: Tensor, found: Gradients) -> None:
    """Against torch's own autograd over the same blocks."""
    hidden, prompts, lora, gradient = given()
    leaves = [one.requires_grad_() for one in (hidden, prompts, *lora.values())]
    expected = reference(WHOLE, hidden, prompts, lora, ALPHA / RANK)
    expected.backward(gradient)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
    adapter = [found.adapter[name] for name in lora]
    for one, leaf in zip((found.hidden, found.prompts, *adapter), leaves, strict=True):
        torch.testing.assert_close(one, leaf.grad, rtol=1e-5, atol=1e-5)


def toy(spans: dict[int, Span] = CHAIN, **more: Any) -> ToySwarm:
    return ToySwarm(spans, scale=ALPHA / RANK, **more)


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "forgotten"])
def test_gradients_are_those_of_one_process(keeps: bool) -> None:
    swarm = toy(keeps=keeps)
    check(*run(step(swarm)))
    assert swarm.total("forward") == swarm.total("backward") == 9  # 3 parts over 3 servers
    assert swarm.total("adapter") == 3  # once each, though parts came together


def test_the_route_does_not_matter() -> None:
    one, other = run(step(toy(SPANS))), run(step(toy({1: WHOLE})))
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one[1].hidden, other[1].hidden, rtol=1e-5, atol=1e-6)
    again = run(step(toy({1: WHOLE})))
    assert torch.equal(other[0], again[0]) and torch.equal(other[1].prompts, again[1].prompts)


def test_parts_follow_each_other_through_the_chain() -> None:
    """9 calls of a second each, on three servers at once: far below the sum."""

    async def main() -> float:
        began_s = asyncio.get_running_loop().time()
        hidden, *_ = given()
        await Passes(toy(), QUICK).forward(Work(WHOLE), hidden)
        return asyncio.get_running_loop().time() - began_s

    assert run(main()) < 6 * COMPUTE_S
    flight: list[int] = []

    async def bounded() -> None:
        swarm = toy()
        under_way = 0

        async def counted(span: Span, inputs: Any, *, keep: bool = False) -> Any:
            nonlocal under_way
            under_way += 1
            flight.append(under_way)
            try:
                return await forward(span, inputs, keep=keep)
            finally:
                under_way -= 1

        forward = swarm.places[peer(1)].forward
        swarm.places[peer(1)].forward = counted  # type: ignore[method-assign]
        hidden = torch.randn(40, TOKENS, E)
        await Passes(swarm, TrainingSettings(part_tokens=3, in_flight=4)).forward(Work(WHOLE), hidden)

    run(bounded())
    assert max(flight) <= 4


@pytest.mark.parametrize("victim", [1, 2, 3])
@pytest.mark.parametrize("at", range(18))
def test_a_death_at_any_call(victim: int, at: int) -> None:
    """18 calls are an undisturbed step; a death costs at most the victim's parts again, and their forward."""
    swarm = toy(SPANS)

    def kill(number: int, who: PeerId, which: str) -> None:
        if number == at:
            swarm.kill(victim)

    swarm.on_call = kill
    check(*run(step(swarm)))
    assert swarm.n_calls <= 18 + 6 * 3


@pytest.mark.parametrize("at", [0, 4, 10, 16])
def test_a_server_that_falls_silent(at: int) -> None:
    swarm = toy(SPANS)
    swarm.on_call = lambda number, who, which: swarm.silent.add(who) if number == at else None
    check(*run(step(swarm)))


def test_all_but_one_chain_dies_between_forward_and_backward() -> None:
    swarm = toy(SPANS)

    def between() -> None:
        for number in (1, 2, 3):
            swarm.kill(number)

    check(*run(step(swarm, between=between)))


def test_blocks_that_are_nowhere_are_named() -> None:
    swarm = toy()
    with pytest.raises(MissingBlocks, match="2:4"):
        run(step(swarm, between=lambda: swarm.kill(2)))


def test_a_failure_is_reported_once() -> None:
    """However many parts were under way there."""
    swarm = toy()

    def between() -> None:
        swarm.kill(1)
        swarm.places[peer(4)] = ToyServer(swarm, peer(4), Span(0, 2))

    check(*run(step(swarm, between=between)))
    assert [who for who, _ in swarm.failures] == [peer(1)]


@pytest.mark.parametrize("error", [Busy("full", 1.5), ShuttingDown("leaving")])
def test_who_is_busy_is_asked_again(error: Exception) -> None:
    swarm = toy()

    def refuse(number: int, who: PeerId, which: str) -> None:
        if number in (3, 4, 5, 12):
            raise error

    swarm.on_call = refuse
    check(*run(step(swarm)))


def test_nobody_answers_for_too_long() -> None:
    swarm = toy()

    def refuse(number: int, who: PeerId, which: str) -> None:
        if who == peer(2):
            raise Busy("full")

    swarm.on_call = refuse
    with pytest.raises(Busy):
        run(step(swarm))


def test_a_pass_has_a_deadline() -> None:
    swarm = toy()
    swarm.silent.add(peer(2))
    settings = TrainingSettings(part_tokens=6, call_s=1e6, pass_s=50.0)
    with pytest.raises(DeadlineExceeded, match=r"forward pass over blocks 0:6.*50 s"):
        run(step(swarm, settings))


# -- NaN and Inf -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_server_that_makes_nan_is_replaced(which: str) -> None:
    swarm = toy(SPANS)
    swarm.spoil = lambda who, call, tensor: (
        tensor * float("nan") if call == which and who == peer(2) else tensor
    )
    check(*run(step(swarm)))


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_nan_that_two_servers_make_is_raised_with_their_names(which: str) -> None:
    swarm = toy(CHAIN | {4: Span(2, 4)})
    swarm.spoil = lambda who, call, tensor: (
        tensor * float("inf") if call == which and who in (peer(2), peer(4)) else tensor
    )
    with pytest.raises(NotFinite, match=r"blocks 2:4 at .* and ") as raised:
        run(step(swarm))
    assert peer(2).short() in str(raised.value) and peer(4).short() in str(raised.value)
    assert raised.value.given is False
    assert sum(place.calls[which] for place in swarm.places.values() if place.span == Span(2, 4)) <= 6


def test_a_gradient_that_comes_broken_is_refused_here() -> None:
    async def main() -> None:
        swarm = toy()
        hidden, *_, gradient = given()
        passes, work = Passes(swarm, QUICK), Work(WHOLE)
        _, pieces = await passes.forward(work, hidden, Wants(hidden=True))
        gradient[0, 0, 0] = float("nan")
        calls = swarm.n_calls
        with pytest.raises(NotFinite, match="before any server") as raised:
            await passes.backward(work, pieces, gradient, Wants(hidden=True))
        assert raised.value.given and swarm.n_calls == calls

    run(main())


# -- shapes, sizes, adapters -----------------------------------------------------------------------------


def test_gradients_of_a_wrong_shape() -> None:
    swarm = toy(SPANS)
    swarm.spoil = lambda who, call, tensor: (
        tensor[:, :-1] if call == "backward" and who == peer(3) else tensor
    )
    check(*run(step(swarm)))
    swarm = toy()
    swarm.spoil = lambda who, call, tensor: tensor[:, :-1] if call == "backward" else tensor
    with pytest.raises(BadTensor, match=r"blocks 4:6 .*shape"):
        run(step(swarm))


@pytest.mark.parametrize("most", [TOKENS, 4, 1])
def test_a_batch_that_is_too_large_is_cut(most: int) -> None:
    """1 stands for a server that does not say what it takes."""
    swarm = toy()
    place = swarm.places[peer(2)]
    place.most_tokens = most if most > 1 else TOKENS
    check(*run(step(swarm, TrainingSettings(part_tokens=100))))
    assert place.calls["forward"] >= ROWS


def test_a_row_that_nobody_takes() -> None:
    swarm = toy()
    swarm.places[peer(2)].most_tokens = 2
    with pytest.raises(BatchTooLarge, match="2:4"):
        run(step(swarm))


def test_an_adapter_that_was_dropped_is_sent_again() -> None:
    swarm = toy()

    def drop() -> None:
        for place in swarm.places.values():
            place.adapters.clear()
            place.kept.clear()

    check(*run(step(swarm, between=drop)))
    assert swarm.total("adapter") == 6


def test_a_hosted_adapter_that_is_not_there() -> None:
    async def main() -> None:
        work = Work(WHOLE, None, HostedAdapter(bytes(32)))
        await Passes(toy(), QUICK).forward(work, given()[0])

    with pytest.raises(UnknownAdapter):
        run(main())


def test_only_what_is_wanted_is_asked_for() -> None:
    """A LoRA on the last blocks: backward ends where it begins, and nothing before it is kept."""

    async def main() -> ToySwarm:
        swarm = toy()
        hidden, _, lora, gradient = given()
        top = {name: one for name, one in lora.items() if name.startswith("blocks.5.")}
        passes, work = Passes(swarm, QUICK), work_of(None, top)
        wants = Wants(adapter=True)
        _, pieces = await passes.forward(work, hidden, wants)
        assert all([piece.hop.peer for piece in part] == [peer(3)] for part in pieces)
        found = await passes.backward(work, pieces, gradient, wants)
        assert found.hidden is None and found.adapter.keys() == top.keys()
        return swarm

    swarm = run(main())
    assert [swarm.places[peer(number)].calls["backward"] for number in CHAIN] == [0, 0, 3]
    assert not swarm.places[peer(1)].kept and swarm.places[peer(1)].calls["adapter"] == 0


def test_what_is_remembered_of_servers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who fails, who takes little and who has the adapter, of two servers at most; the rest is found out
    again.
    """
    monkeypatch.setattr("petalite.client.spancalls.MOST_KNOWN", 2)
    swarm = toy(SPANS)
    for place in swarm.places.values():
        place.most_tokens = TOKENS

    async def main() -> None:
        hidden, prompts, lora, gradient = given()
        passes, work = Passes(swarm, QUICK), work_of(prompts, lora)
        output, pieces = await passes.forward(work, hidden, ALL)
        for number in (1, 2, 3, 7):
            swarm.kill(number)
        check(output, await passes.backward(work, pieces, gradient, ALL))
        calls = passes._calls
        assert 0 < len(passes._failures) <= 2
        assert len(calls._most_tokens) == len(calls._sent) == 2
        assert not calls._sending

    swarm.places[peer(8)] = ToyServer(swarm, peer(8), WHOLE)
    run(main())
