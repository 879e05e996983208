"""LoRA of one's own on blocks that are elsewhere (arXiv 2106.09685): A, B and their optimizer are here.

Servers get each version once, by its digest, and return the gradients of A and B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petalite.client.generation import Generation
from petalite.client.model import Prompt
from petalite.client.sync import DistributedModel
from petalite.errors import InvalidArgument
from petalite.model.families import FAMILIES
from petalite.model.loading import BLOCKS
from petalite.model.lora import MAX_RANK
from petalite.tuning.modules import Tuned


class Lora(Tuned):
    """alpha / rank · B · A added to the weights of some linears. `state_dict` has
    `blocks.{index}.{role}.lora_A` (rank, inputs) and `.lora_B` (outputs, rank).
    """

    METHOD = "lora"

    def __init__(
        self,
        model: DistributedModel,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] = ("query", "value"),
        blocks: slice | Sequence[int] = slice(None),
    ) -> None:
        """`targets` are roles of the model's linears: query, key, value, output, gate, up, down; BLOOM's qkv,
        output, up, down. B begins as zeros, so that nothing is changed. Raises InvalidArgument for a role, a
        block or a rank that there is not.
        """
        super().__init__(model)
        if not 0 < rank <= MAX_RANK:
            raise InvalidArgument(f"rank is 1 to {MAX_RANK}, found {rank}")
        shapes = linear_shapes(model)
        unknown = [role for role in targets if role not in shapes]
        if unknown or not targets:
            raise InvalidArgument(f"no linears {unknown}; this model has {', '.join(shapes)}")
        numbers = range(model.config.n_blocks)
        chosen = list(numbers[blocks]) if isinstance(blocks, slice) else sorted(set(blocks))
        if not chosen or not set(chosen) <= set(numbers):
            raise InvalidArgument(f"the model has blocks 0:{len(numbers)}, found {blocks}")
        self.rank, self.alpha = rank, float(alpha)
        self.targets = tuple(targets)
        self.blocks = nn.ModuleDict(
            {
                str(block): nn.ModuleDict({role: Pair(rank, *shapes[role]) for role in targets})
                for block in chosen
            }
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "blocks": [int(block) for block in self.blocks],
        }

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Implements `client.autograd.TrainableLora`."""
        return dict(self.named_parameters())

    def hidden(self, token_ids: Tensor) -> Tensor:
        hidden: Tensor = self._model.blocks[:](self._model.embed(token_ids), lora=self)
        return hidden

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Text by the tuned model, as `DistributedModel.generate` gives it."""
        return self._model.generate(prompt, lora=self, **options)


class Pair(nn.Module):
    """A and B of one linear."""

    def __init__(self, rank: int, n_out: int, n_in: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, n_in))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


def linear_shapes(model: DistributedModel) -> dict[str, tuple[int, int]]:
    """Of each linear of a block, by role: outputs, inputs."""
    config = model.config
    kind = BLOCKS[FAMILIES[config.family].block]
    shapes = kind.tensor_shapes(config)
    roles = [role for roles in kind.stacks(config).values() for role in roles]
    found = {}
    for role in roles:
        n_out, n_in = shapes[f"{role}.weight"]
        found[role] = (n_out, n_in)
    return found
