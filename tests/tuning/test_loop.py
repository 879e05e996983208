"""A training loop as people write it: torch's optimizers, DataLoader, accumulation, clipping and autocast, on
modules whose blocks are elsewhere.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from petalite.client.sync import DistributedModel
from petalite.errors import InvalidArgument, NotFinite
from petalite.tuning import Adapter, Between, Classifier, DeepPrompts, Lora, PromptTuning, Tuned

IDS = torch.randint(0, 256, (8, 9), generator=torch.Generator().manual_seed(0))


def loss_of(module: nn.Module, ids: Tensor = IDS) -> Tensor:
    logits = module(ids)
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def grown(model: DistributedModel) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "prompt": PromptTuning(model, 3),
        "deep": DeepPrompts(model, 3),
        "lora": Lora(model, 4, targets=("query", "value", "gate")),
        "between": Between(model, {3: Adapter(64, 8)}),
    }


@pytest.mark.parametrize("method", ["prompt", "deep", "lora", "between"])
def test_the_loss_goes_down(model: DistributedModel, method: str) -> None:
    module = grown(model)[method]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.03)
    loader = DataLoader(TensorDataset(IDS), batch_size=4, shuffle=True)
    before = loss_of(module).item()
    for _ in range(6):
        for (ids,) in loader:
            optimizer.zero_grad()
            loss_of(module, ids).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    assert loss_of(module).item() < before - 0.05


def test_accumulated_batches_are_one_batch(model: DistributedModel) -> None:
    module = Lora(model, 4)
    nn.init.normal_(module.get_parameter("blocks.2.query.lora_B"))
    loss_of(module).backward()
    whole = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    module.zero_grad()
    for ids in IDS.split(2):
        (loss_of(module, ids) / 4).backward()
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_the_trainable_part_is_all_there_is(model: DistributedModel) -> None:
    modules = grown(model)
    sizes = {
        name: sum(one.numel() for one in module.state_dict().values()) for name, module in modules.items()
    }
    assert sizes["prompt"] == 3 * 64 and sizes["deep"] == 6 * 3 * 64
    assert sizes["lora"] == 6 * 4 * ((64 + 64) + (64 + 32) + (64 + 96))
    assert {one.requires_grad for module in modules.values() for one in module.parameters()} == {True}
    assert not list(Tuned(model).parameters())
    assert set(Lora(model, 1, blocks=[5]).state_dict()) == {
        f"blocks.5.{role}.lora_{side}" for role in ("query", "value") for side in "AB"
    }


def test_untrained_methods_change_nothing(model: DistributedModel) -> None:
    expected = Tuned(model)(IDS)
    for module in (Lora(model, 4), Between(model, {0: Adapter(64, 8), 6: Adapter(64, 8)})):
        torch.testing.assert_close(module(IDS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(IDS), expected, rtol=1e-4, atol=1e-4)


def test_padding_on_the_right_changes_nothing_before_it(model: DistributedModel) -> None:
    classifier = Classifier(PromptTuning(model, 3), 3)
    nn.init.normal_(classifier.classes.weight)
    lengths = torch.tensor([9, 4, 7, 1, 9, 2, 3, 5])
    padded = IDS.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 0
    found = classifier(padded, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            found[row], classifier(IDS[row : row + 1, :length])[0], rtol=1e-4, atol=1e-4
        )
    for wrong in (lengths - 1, lengths + 1, lengths[:3]):
        with pytest.raises(InvalidArgument, match="lengths"):
            classifier(padded, wrong)


def test_autocast_is_safe(model: DistributedModel) -> None:
    """What is computed here goes in bfloat16 where torch thinks so; blocks get and give float32."""
    module = Between(model, {3: Adapter(64, 8)})
    nn.init.normal_(module.get_parameter("between.3.up.weight"), std=0.1)
    loss_of(module).backward()
    exact = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(module)
    loss.backward()
    for name, one in module.named_parameters():
        assert one.grad is not None and one.grad.dtype == torch.float32
        assert float((one.grad - exact[name]).norm() / exact[name].norm()) < 0.1


def test_bfloat16_hidden_states_get_bfloat16_gradients(model: DistributedModel) -> None:
    hidden = torch.randn(2, 5, 64).bfloat16().requires_grad_()
    output = model.blocks[1:4](hidden)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_a_graph_is_used_twice_only_if_it_is_kept(model: DistributedModel) -> None:
    module = PromptTuning(model, 3)
    loss = loss_of(module)
    loss.backward(retain_graph=True)
    first = copy.deepcopy(module.prompt.grad)
    loss.backward()
    torch.testing.assert_close(module.prompt.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_what_was_changed_in_place_is_noticed(model: DistributedModel) -> None:
    hidden = torch.randn(2, 5, 64, requires_grad=True)
    entering = hidden * 1.0
    output = model.blocks[:](entering)
    entering.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_step_between_forward_and_backward_does_not_mix_versions(model: DistributedModel) -> None:
    """The gradient is that of the version that went forward."""
    module = Lora(model, 2, targets=("value",), blocks=[1])
    nn.init.normal_(module.get_parameter("blocks.1.value.lora_B"))
    hidden = torch.randn(2, 5, 64)
    output = model.blocks[:](hidden, lora=module)
    output.sum().backward()
    expected = [one.grad.clone() for one in module.parameters() if one.grad is not None]
    module.zero_grad()
    output = model.blocks[:](hidden, lora=module)
    with torch.no_grad():
        for one in module.parameters():
            one.mul_(3.0)
    output.sum().backward()
    for one, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(one.grad, gradient)


def test_a_nan_of_the_loss_is_named(model: DistributedModel) -> None:
    module = PromptTuning(model, 3)
    with pytest.raises(NotFinite, match="look at the loss"):
        (loss_of(module) * float("nan")).backward()


def test_without_grad_nothing_is_kept(model: DistributedModel) -> None:
    module = Lora(model, 2)
    with torch.no_grad():
        assert not module(IDS).requires_grad
    assert not Tuned(model)(IDS).requires_grad


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model: PromptTuning(model, 0), "1 to"),
        (lambda model: PromptTuning(model, 5000), "1 to"),
        (lambda model: PromptTuning(model, 2, text=""), "empty"),
        (lambda model: Lora(model, 0), "rank"),
        (lambda model: Lora(model, 4, targets=("router",)), "router.*query"),
        (lambda model: Lora(model, 4, targets=()), "linears"),
        (lambda model: Lora(model, 4, blocks=[6]), "blocks 0:6"),
        (lambda model: Lora(model, 4, blocks=slice(6, 9)), "blocks 0:6"),
        (lambda model: Between(model, {}), "behind the last"),
        (lambda model: Between(model, {7: nn.Identity()}), "behind the last"),
        (lambda model: Classifier(Tuned(model), 1), "two classes"),
        (lambda model: model.blocks[0:2](torch.randn(1, 4, 64), prompts=torch.zeros(3, 2, 64)), "prompts"),
        (lambda model: model.blocks[0:2](torch.randn(1, 4, 64), prompts=torch.zeros(2, 5, 64)), "prompts"),
    ],
)
def test_what_cannot_be(model: DistributedModel, make: object, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        make(model)  # type: ignore[operator]
