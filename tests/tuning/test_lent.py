"""A LoRA that servers lend, chosen by its digest: over real processes, in text and in gradients."""

from __future__ import annotations

from pathlib import Path

import torch

import petalite
from petalite.client.sync import DistributedModel
from petalite.model.checkpoint import Checkpoint
from petalite.model.loading import block_kind
from petalite.model.lora import read_peft
from petalite.node.processes import serve_node
from petalite.tuning import Lora
from tests.helpers.lora import ALPHA, RANK, factors, peft_folder

ROLES = ("query", "down")
PROMPT = [1, 2, 3]


def test_a_lent_lora_answers_like_ones_own(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    tensors = factors(checkpoint, ROLES, range(checkpoint.config.n_blocks))
    lent = peft_folder(checkpoint, tensors, tmp_path / "tone")
    digest = read_peft(lent, checkpoint.config, block_kind(checkpoint), checkpoint.family.names).digest
    with petalite.load(str(folder)) as alone:
        own = Lora(alone, RANK, ALPHA, targets=ROLES)
        own.load_state_dict(tensors)
        text = own.generate(PROMPT, max_new_tokens=12).token_ids
        plain = alone.generate(PROMPT, max_new_tokens=12).token_ids
        output, gradient = through(alone, own)
    more = ("--adapter", str(lent))
    with (
        serve_node(str(folder), "0:3", [], *more) as first,
        serve_node(str(folder), "3:6", [first.address], *more) as second,
        petalite.load(str(folder), peers=[first.address, second.address]) as model,
    ):
        assert model.generate(PROMPT, max_new_tokens=12, lora=digest).token_ids == text != plain
        assert model.generate(PROMPT, max_new_tokens=12).token_ids == plain
        for found, expected in zip(through(model, digest), (output, gradient), strict=True):
            assert float((found - expected).norm() / expected.norm()) < 1e-5


def through(model: DistributedModel, lora: Lora | bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out of all blocks for fixed states, and the gradient of its squares at what went in."""
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    hidden.requires_grad_()
    output = model.blocks[:](hidden, lora=lora)
    output.square().sum().backward()
    assert hidden.grad is not None
    return output.detach(), hidden.grad
