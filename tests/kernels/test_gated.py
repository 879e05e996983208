"""The gate of an MLP: the numbers of autograd, and less saved for them."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from petalite.kernels.gated import gated


def halves(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randn(3, 10, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    return gate, up


def test_gradients_are_those_of_finite_differences() -> None:
    gate, up = (half.detach().requires_grad_() for half in halves())
    assert torch.autograd.gradcheck(gated, (gate, up))
    assert torch.autograd.gradcheck(lambda gate: gated(gate, up.detach()), (gate,))


def test_the_same_with_and_without_gradients() -> None:
    gate, up = halves(torch.float32)
    expected = silu(gate) * up
    assert torch.equal(gated(gate, up), expected)
    with torch.no_grad():
        assert torch.equal(gated(gate.clone(), up), expected)


def test_nothing_is_saved_but_what_came_in() -> None:
    saved: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    gate, up = halves()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gated(gate, up)
    assert saved == {gate.untyped_storage().data_ptr()}
