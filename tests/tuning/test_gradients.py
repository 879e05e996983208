"""Gradients of every method, over three servers, against transformers' own model of the same checkpoint in
one process: float32, 1e-5 of their norm.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from petalite.client.sync import DistributedModel
from petalite.tuning import Adapter, Between, Classifier, DeepPrompts, Lora, PromptTuning

E, P = 64, 3
IDS = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def jittered(module: nn.Module) -> nn.Module:
    """Away from where it begins: zeros would hide a wrong gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def embedded(reference: Any, before: Tensor | None = None) -> Tensor:
    embeddings = reference.get_input_embeddings()(IDS)
    return embeddings if before is None else torch.cat((before.expand(len(IDS), -1, -1), embeddings), dim=1)


def through(reference: Any, embeddings: Tensor, head: bool = True) -> Tensor:
    output = reference.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return reference.lm_head(output) if head else output


class Hooks:
    """Of one forward."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def before(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        self.handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: ((change(args[0]), *args[1:]), kwargs), with_kwargs=True
            )
        )

    def after(self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.handles.append(module.register_forward_hook(lambda _, args, out: change(args[0], out)))

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self.handles:
            handle.remove()


def prompt_reference(module: Any, reference: Any) -> Tensor:
    return through(reference, embedded(reference, module.prompt))[:, P:]


def deep_reference(module: Any, reference: Any) -> Tensor:
    with Hooks() as hooks:
        for layer, prompt in zip(reference.model.layers, module.prompts, strict=True):
            hooks.before(layer, lambda hidden, p=prompt: torch.cat((hidden[:, :P] + p, hidden[:, P:]), dim=1))
        return through(reference, embedded(reference, torch.zeros(P, E)))[:, P:]


PARTS = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "down": "mlp.down_proj", "up": "mlp.up_proj"}


def lora_reference(module: Any, reference: Any) -> Tensor:
    with Hooks() as hooks:
        for block, roles in module.blocks.items():
            for role, pair in roles.items():
                part = reference.model.layers[int(block)].get_submodule(PARTS[role])
                hooks.after(
                    part,
                    lambda x, out, p=pair: (
                        out + module.alpha / module.rank * linear(linear(x, p.lora_A), p.lora_B)
                    ),
                )
        return through(reference, embedded(reference))


def between_reference(module: Any, reference: Any) -> Tensor:
    with Hooks() as hooks:
        for place, inner in module.between.items():
            hooks.before(reference.model.layers[int(place)], inner)
        return through(reference, embedded(reference))


def classifier_reference(module: Any, reference: Any) -> Tensor:
    normed = through(reference, embedded(reference, module.body.prompt), head=False)
    return linear(normed[:, -1], module.classes.weight, module.classes.bias)


METHODS: dict[str, tuple[Callable[[DistributedModel], nn.Module], Callable[[Any, Any], Tensor]]] = {
    "prompt": (lambda model: PromptTuning(model, P), prompt_reference),
    "deep prompts": (lambda model: DeepPrompts(model, P), deep_reference),
    "lora": (
        lambda model: Lora(model, 4, 8.0, targets=("query", "key", "up", "down"), blocks=slice(1, 5)),
        lora_reference,
    ),
    "between": (
        lambda model: Between(model, {2: Adapter(E, 8), 4: Adapter(E, 8)}),
        between_reference,
    ),
    "classifier": (lambda model: Classifier(PromptTuning(model, P), 4), classifier_reference),
}


def losses(module: nn.Module, logits: Tensor) -> Tensor:
    if isinstance(module, Classifier):
        return cross_entropy(logits, torch.arange(len(IDS)))
    return cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_one_process(method: str, model: DistributedModel, reference: Any) -> None:
    make, expected_of = METHODS[method]
    module = jittered(make(model))
    logits = module(IDS)
    expected_logits = expected_of(module, reference)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    found = gradients(module, losses(module, logits))
    expected = gradients(module, losses(module, expected_logits))
    assert found.keys() == expected.keys() == dict(module.named_parameters()).keys()
    for name, gradient in expected.items():
        off = float((found[name] - gradient).norm() / gradient.norm())
        assert off < 1e-5, f"{name} is off by {off:.1e}"
        assert gradient.norm() > 0
