"""Versions of tuned modules: saved and loaded they give the same logits, go on with a parent, and are refused
where they do not belong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from petalite.client.sync import DistributedModel
from petalite.errors import InvalidAdapter
from petalite.model.checkpoint import Checkpoint
from petalite.model.loading import block_kind
from petalite.model.lora import read_adapter
from petalite.model.versions import CARD, lineage, list_versions
from petalite.tuning import (
    Adapter,
    Between,
    Classifier,
    DeepPrompts,
    Lora,
    PromptTuning,
    Tuned,
    load_version,
    save_version,
)
from tests.helpers.checkpoints import tiny_llama
from tests.tuning.conftest import SPANS
from tests.tuning.places import open_over

IDS = torch.arange(12).view(2, 6)

METHODS: dict[str, Callable[[DistributedModel], nn.Module]] = {
    "prompt": lambda model: PromptTuning(model, 3),
    "deep-prompts": lambda model: DeepPrompts(model, 2),
    "lora": lambda model: Lora(model, 4, 12.0, targets=("key", "down"), blocks=[1, 4]),
    "classifier": lambda model: Classifier(Lora(model, 2), 3),
    "linear probe": lambda model: Classifier(Tuned(model), 3),
}


def trained(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for one in module.parameters():
            one.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return module


@pytest.mark.parametrize("method", METHODS)
def test_loaded_versions_give_the_same_logits(model: DistributedModel, tmp_path: Path, method: str) -> None:
    module = trained(METHODS[method](model))
    version = save_version(tmp_path, module, metrics={"loss": 1.5}, note="test")
    assert version.card.model == model.model_id and version.card.metrics == {"loss": 1.5}
    for which, folder in ((version.path, None), (version.short, tmp_path), (version.digest, tmp_path)):
        again, found = load_version(which, model, folder=folder)
        assert found == version and type(again) is type(module)
        with torch.no_grad():
            assert torch.equal(again(IDS), module(IDS))


def test_training_goes_on_with_a_parent(model: DistributedModel, tmp_path: Path) -> None:
    first = save_version(tmp_path, PromptTuning(model, 3))
    module, parent = load_version(first.short, model, folder=tmp_path)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(IDS).logsumexp(-1).mean().backward()
    optimizer.step()
    second = save_version(tmp_path, module, parent=parent)
    assert second.card.parent == first.digest != second.digest
    versions, broken = list_versions(tmp_path)
    assert [(one.digest, depth) for one, depth in lineage(versions)] == [
        (first.digest, 0),
        (second.digest, 1),
    ]
    assert not broken


def test_modules_of_ones_own_are_loaded_into_one(model: DistributedModel, tmp_path: Path) -> None:
    module = trained(Between(model, {3: Adapter(64, 8)}))
    version = save_version(tmp_path, module)
    assert version.card.method == "between" and version.card.settings == {"places": [3]}
    with pytest.raises(InvalidAdapter, match="into=MODULE"):
        load_version(version.path, model)
    again, _ = load_version(version.path, model, into=Between(model, {3: Adapter(64, 8)}))
    with torch.no_grad():
        assert torch.equal(again(IDS), module(IDS))
    with pytest.raises(InvalidAdapter, match=r"between\.3\.down.*expected"):
        load_version(version.path, model, into=Between(model, {3: Adapter(64, 4)}))


def test_a_module_that_stands_in_two_places(model: DistributedModel, tmp_path: Path) -> None:
    shared, empty = Adapter(64, 8), Adapter(64, 8)
    module = trained(Between(model, {1: shared, 3: shared}))
    version = save_version(tmp_path, module)
    again, _ = load_version(version.path, model, into=Between(model, {1: empty, 3: empty}))
    with torch.no_grad():
        assert torch.equal(again(IDS), module(IDS))


def test_a_lora_is_saved_as_servers_read_it(model: DistributedModel, folder: Path, tmp_path: Path) -> None:
    version = save_version(tmp_path, trained(METHODS["lora"](model)))
    checkpoint = Checkpoint.open(folder)
    adapter = read_adapter(
        version.path.read_bytes(), checkpoint.model_id(), checkpoint.config, block_kind(checkpoint)
    )
    assert set(adapter.scales.values()) == {3.0} and set(adapter.tensors) == set(version.shapes)


def test_another_models_version_is_refused(model: DistributedModel, tmp_path: Path) -> None:
    version = save_version(tmp_path / "versions", PromptTuning(model, 3))
    other = tiny_llama(tmp_path / "other", num_hidden_layers=6, seed=1)
    with open_over(other, SPANS) as another, pytest.raises(InvalidAdapter, match="is for tiny@"):
        load_version(version.path, another)


@pytest.mark.parametrize(
    ("card", "tensors", "says"),
    [
        ({"method": "magic"}, {}, "magic"),
        ({"method": "prompt"}, {}, "n_tokens"),
        ({"method": "prompt", "settings": {"n_tokens": -1}}, {}, "settings that cannot be"),
        ({"method": "prompt", "settings": {"n_tokens": "3"}}, {}, "settings that cannot be"),
        (
            {"method": "prompt", "settings": {"n_tokens": 2000}},
            {"prompt": torch.zeros(3, 64)},
            "than its tensors",
        ),
        (
            {"method": "prompt", "settings": {"n_tokens": 3}},
            {"prompt": torch.zeros(4, 64)},
            "prompt has shape",
        ),
        (
            {"method": "prompt", "settings": {"n_tokens": 3}},
            {"prompt": torch.full((3, 64), float("nan"))},
            "NaN",
        ),
        (
            {"method": "lora", "settings": {"rank": 1024, "alpha": 1.0, "targets": ["up"], "blocks": [0]}},
            {"x": torch.zeros(4)},
            "than its tensors",
        ),
        (
            {"method": "prompt", "settings": {"n_tokens": 3}},
            {"prompt": torch.zeros(3, 64).to(torch.float8_e4m3fn)},
            "float8_e4m3fn",
        ),
        (
            {"method": "lora", "settings": {"rank": 1, "alpha": 10**400, "targets": ["up"], "blocks": [0]}},
            {"x": torch.zeros(64)},
            "settings that cannot be",
        ),
        (
            {"method": "lora", "settings": {"rank": 1, "alpha": 1.0, "targets": ["router"], "blocks": [0]}},
            {"x": torch.zeros(4)},
            "router",
        ),
        ({"method": "classifier", "settings": {"n_classes": 2, "body": "magic"}}, {}, "magic"),
    ],
)
def test_cards_that_do_not_fit_are_refused(
    model: DistributedModel,
    tmp_path: Path,
    card: dict[str, object],
    tensors: dict[str, torch.Tensor],
    says: str,
) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps({"model": model.model_id, **card})
    save_file(tensors or {"x": torch.zeros(400)}, path, metadata={CARD: text})
    with pytest.raises(InvalidAdapter, match=says):
        load_version(path, model)
