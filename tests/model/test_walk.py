"""A walk in pieces against one autograd over the whole span: the same outputs and the same gradients,
whatever the pieces and whatever was held on to.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from petalite.errors import BadTensor
from petalite.model.checkpoint import Checkpoint
from petalite.model.lora import Adapter
from petalite.model.span import BlockSpan, load_span
from petalite.model.walk import Gradients, Hold, Walk, activation_bytes
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.lora import adapter_of, factors, linear_roles

R = TypeVar("R")
START, END, ROWS, TOKENS, PROMPTS = 1, 3, 5, 11, 4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3, window": {"model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 5},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "bloom": {"model_type": "bloom"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("tiny"), **FAMILIES[request.param]))


def run(pieces: Generator[None, None, R]) -> tuple[R, int]:
    """What it ends with, and how many pieces it took."""
    count = 0
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value, count
        count += 1


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Inputs of one call, and what plain autograd makes of them."""

    def __init__(self, checkpoint: Checkpoint, span: BlockSpan, *, prompts: bool = True, lora: bool = True):
        self.span = span
        self.hidden = numbers(ROWS, TOKENS, 64)
        self.gradient = numbers(ROWS, TOKENS, 64, seed=1)
        self.prompts = numbers(END - START, PROMPTS, 64, seed=2) if prompts else None
        roles = linear_roles(checkpoint)
        self.adapter = adapter_of(checkpoint, factors(checkpoint, roles)) if lora else None

    def walk(self, hold: Hold, piece_rows: int) -> Walk:
        inputs = self.hidden, self.prompts, self.adapter
        return Walk(self.span, START, END, *inputs, hold=hold, piece_rows=piece_rows)

    def expected(self) -> tuple[Tensor, Gradients]:
        hidden = self.hidden.clone().requires_grad_()
        prompts = None if self.prompts is None else self.prompts.clone().requires_grad_()
        adapter, leaves = self.adapter, []
        if adapter is not None:
            tensors = {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors.items()}
            adapter = replace(adapter, tensors=tensors)
            leaves = [tensors[name] for name in adapter.names(START, END)]
        output = self.span.forward_stateless(hidden, start=START, end=END, prompts=prompts, adapter=adapter)
        output.backward(self.gradient.to(output.dtype))  # type: ignore[no-untyped-call]
        flat = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return output.detach(), Gradients(
            hidden.grad,
            None if prompts is None else prompts.grad,
            torch.cat([grad.flatten() for grad in flat]) if leaves else None,
        )


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value."""
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert actual.shape == expected.shape
        assert float(expected.abs().max()) > 0
        assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("hold", [Hold.INPUTS, Hold.EVERYTHING], ids=lambda hold: hold.name)
@pytest.mark.parametrize("piece_rows", [1, 2, 5])
def test_gradients_are_those_of_one_autograd(checkpoint: Checkpoint, hold: Hold, piece_rows: int) -> None:
    case = Case(checkpoint, load_span(checkpoint, START, END))
    output, gradients = case.expected()
    walk = case.walk(hold, piece_rows)
    computed, n_pieces = run(walk.forward())
    assert n_pieces == (END - START) * -(-ROWS // piece_rows)
    found, n_back = run(walk.backward(case.gradient, hidden=True, prompts=True, adapter=True))
    assert n_back == n_pieces
    close(computed, output)
    close(found.hidden, gradients.hidden)
    close(found.prompts, gradients.prompts)
    close(found.adapter, gradients.adapter)


def test_only_what_is_wanted_comes_back(checkpoint: Checkpoint) -> None:
    case = Case(checkpoint, load_span(checkpoint, START, END))
    assert case.adapter is not None
    names = [name for name in case.adapter.tensors if name.startswith("blocks.2.")]
    case.adapter = replace(
        case.adapter,
        tensors={name: case.adapter.tensors[name] for name in names},
        scales={place: scale for place, scale in case.adapter.scales.items() if place[0] == 2},
    )
    _, gradients = case.expected()
    walk = case.walk(Hold.INPUTS, 5)
    run(walk.forward())
    found, n_back = run(walk.backward(case.gradient, hidden=False, prompts=False, adapter=True))
    assert n_back == 1  # nothing below block 2 has a share in it
    close(found.adapter, gradients.adapter)
    assert found.hidden is None and found.prompts is None


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_gradients_pass_quantized_weights(tmp_path: Any, quant: str) -> None:
    checkpoint = Checkpoint.open(tiny_llama(tmp_path))
    case = Case(checkpoint, load_span(checkpoint, START, END, quant=quant))
    _, gradients = case.expected()
    walk = case.walk(Hold.EVERYTHING, 2)
    run(walk.forward())
    found, _ = run(walk.backward(case.gradient, hidden=True, prompts=True, adapter=True))
    # Activations are rounded on the way forward, by the token: pieces change nothing of that.
    close(found.hidden, gradients.hidden, 1e-4)
    close(found.adapter, gradients.adapter, 1e-4)


def test_gradients_in_bfloat16(checkpoint: Checkpoint) -> None:
    """Of prompts and adapter they are summed in float32, in whatever the blocks compute."""
    case = Case(checkpoint, load_span(checkpoint, START, END, dtype=torch.bfloat16))
    _, gradients = case.expected()
    walk = case.walk(Hold.EVERYTHING, 2)
    run(walk.forward())
    found, _ = run(walk.backward(case.gradient, hidden=True, prompts=True, adapter=True))
    assert found.prompts is not None and found.adapter is not None
    assert found.prompts.dtype == found.adapter.dtype == torch.float32
    close(found.hidden, gradients.hidden, 0.03)
    close(found.prompts, gradients.prompts, 0.03)
    close(found.adapter, gradients.adapter, 0.03)


def test_a_forward_without_backward_holds_nothing(checkpoint: Checkpoint) -> None:
    case = Case(checkpoint, load_span(checkpoint, START, END), prompts=False, lora=False)
    walk = case.walk(Hold.NOTHING, 3)
    output, _ = run(walk.forward())
    assert not output.requires_grad
    assert not walk._held
    close(output, case.expected()[0])


def test_nothing_of_the_model_or_the_adapter_asks_for_gradients(checkpoint: Checkpoint) -> None:
    case = Case(checkpoint, load_span(checkpoint, START, END))
    assert case.adapter is not None
    walk = case.walk(Hold.EVERYTHING, 2)
    run(walk.forward())
    run(walk.backward(case.gradient, hidden=True, prompts=True, adapter=True))
    assert not any(
        tensor.requires_grad or tensor.grad is not None for tensor in case.adapter.tensors.values()
    )
    weights = [linear.dense() for block in case.span._blocks for linear in block.linears.values()]
    assert not any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize("row_tokens", [32, 256])
@pytest.mark.parametrize("adapted", [True, False], ids=["LoRA", "plain"])
def test_what_autograd_saves_is_within_the_formula(
    checkpoint: Checkpoint, row_tokens: int, adapted: bool
) -> None:
    """Counted with autograd's own hooks, by what four rows more take."""
    span = load_span(checkpoint, 0, 1)
    adapter = adapter_of(checkpoint, factors(checkpoint, linear_roles(checkpoint), range(1)))
    leaves: dict[str, Tensor] = {name: t.requires_grad_() for name, t in adapter.tensors.items()}

    def saved(n_rows: int) -> int:
        storages: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        hidden = numbers(n_rows, row_tokens, 64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            lora = Adapter(adapter.digest, leaves, adapter.scales) if adapted else None
            span.forward_stateless(hidden, adapter=lora)
        return sum(storage.nbytes() for storage in storages.values())

    formula = 4 * row_tokens * activation_bytes(span, row_tokens, adapted=adapted)
    assert formula / 2 < saved(8) - saved(4) <= formula


def test_wrong_shapes_are_refused(checkpoint: Checkpoint) -> None:
    span = load_span(checkpoint, START, END)
    wrong: list[tuple[Tensor, Tensor | None]] = [
        (numbers(2, 64), None),
        (numbers(2, 3, 63), None),
        (numbers(0, 3, 64), None),
        (numbers(2, 3, 64), numbers(2, 4, 64)),  # more prompts than tokens
        (numbers(2, 3, 64), numbers(1, 2, 64)),  # of one block
        (numbers(2, 3, 64), numbers(2, 0, 64)),
        (torch.zeros(2, 3, 64, dtype=torch.int64), None),
    ]
    for hidden, prompts in wrong:
        with pytest.raises(BadTensor):
            Walk(span, START, END, hidden, prompts)
