"""What is trained here while the blocks stay elsewhere: modules of prompts, adapters and heads.

Each is an `nn.Module` whose parameters are its trained part and nothing else, so optimizers, clipping,
`state_dict` and `DataLoader` work as everywhere. A batch is token ids (B, T), shorter texts padded on the
right with any id: attention is causal, so padding changes nothing before it; leave it out of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petalite.client.generation import Generation
from petalite.client.model import Prompt
from petalite.client.options import Options
from petalite.client.sync import DistributedModel
from petalite.errors import InvalidArgument, PromptTooLong


class Tuned(nn.Module):
    """A model as it is. What is trained is a subclass's."""

    METHOD: ClassVar[str] = "none"

    def __init__(self, model: DistributedModel) -> None:
        super().__init__()
        self._model = model

    @property
    def model(self) -> DistributedModel:
        return self._model

    @property
    def settings(self) -> dict[str, Any]:
        """What it is made with again, beside the model and its parameters."""
        return {}

    def hidden(self, token_ids: Tensor) -> Tensor:
        """token_ids (B, T) → (B, T, E) after the last block. Raises what `Blocks.forward` raises."""
        hidden: Tensor = self._model.blocks[:](self._model.embed(token_ids))
        return hidden

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids (B, T) → logits (B, T, V) float32 of what follows each token."""
        return self._model.head(self.hidden(token_ids))

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Text by the tuned model, with the options of `DistributedModel.generate`.

        Without a cache: each token costs a forward of the whole text. Methods that a session can carry have
        their own.
        """
        chosen = Options(**options)
        if chosen.speculate is not None:
            raise InvalidArgument("without a cache there is nothing to speculate with; leave out speculate")
        reply = self._model.reply(prompt, chosen)
        text, longest = list(reply.prompt_ids), self._model.config.max_position_embeddings
        if not 0 < len(text) < longest:
            raise PromptTooLong(f"the prompt has {len(text)} tokens; the model takes 1 to {longest - 1}")
        while not reply.has_stopped and len(text) < min(
            longest, len(reply.prompt_ids) + chosen.max_new_tokens
        ):
            with torch.no_grad():
                logits = self._model.head(self.hidden(torch.tensor([text]))[:, -1:])
            choice = reply.chooser.choose(logits[0, 0], text)
            text.append(choice.token_id)
            reply.take(choice)
        reply.end()
        return reply.generation(self._model.trace())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


class PromptTuning(Tuned):
    """Tokens that are no words, before every text (arXiv 2104.08691): `prompt` (P, E)."""

    METHOD = "prompt"

    def __init__(self, model: DistributedModel, n_tokens: int, *, text: str | None = None) -> None:
        """It begins as the embeddings of `text`, repeated or cut; without one, of tokens drawn at random."""
        super().__init__(model)
        self.n_tokens = _checked_count(model, n_tokens)
        self.prompt = nn.Parameter(_embedded(model, n_tokens, text).float())

    @property
    def settings(self) -> dict[str, Any]:
        return {"n_tokens": self.n_tokens}

    def hidden(self, token_ids: Tensor) -> Tensor:
        embedded = self._model.embed(token_ids)
        before = self.prompt.expand(len(token_ids), -1, -1).to(embedded.device)
        hidden: Tensor = self._model.blocks[:](torch.cat((before, embedded), dim=1))
        return hidden[:, self.n_tokens :]

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Text by the tuned model, as `DistributedModel.generate` gives it."""
        return self._model.generate(prompt, prefix=self.prompt, **options)


class DeepPrompts(Tuned):
    """Tokens that are no words, of each block its own (P-tuning v2, arXiv 2110.07602): `prompts` (L, P, E)
    are added to the first P positions of what enters each block, which the text stands behind.
    """

    METHOD = "deep-prompts"

    def __init__(self, model: DistributedModel, n_tokens: int, *, text: str | None = None) -> None:
        """The first block's begin as those of `PromptTuning`, the others' as nothing."""
        super().__init__(model)
        self.n_tokens = _checked_count(model, n_tokens)
        first = _embedded(model, n_tokens, text).float()
        self.prompts = nn.Parameter(torch.zeros(model.config.n_blocks, *first.shape))
        self.prompts.data[0] = first

    @property
    def settings(self) -> dict[str, Any]:
        return {"n_tokens": self.n_tokens}

    def hidden(self, token_ids: Tensor) -> Tensor:
        embedded = self._model.embed(token_ids)
        room = embedded.new_zeros(len(token_ids), self.n_tokens, embedded.shape[2])
        hidden: Tensor = self._model.blocks[:](torch.cat((room, embedded), dim=1), prompts=self.prompts)
        return hidden[:, self.n_tokens :]


class Adapter(nn.Module):
    """A bottleneck added to what it is given (arXiv 1902.00751): (…, E) → (…, E), at first unchanged."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down, self.up = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = self.up(nn.functional.gelu(self.down(self.norm(hidden))))
        return hidden + changed


class Between(Tuned):
    """Modules of one's own between blocks: the one at k is given what block k gets, (B, T, E), and block k
    gets what it gives. The one at L is behind the last.
    """

    METHOD = "between"

    def __init__(self, model: DistributedModel, modules: Mapping[int, nn.Module]) -> None:
        super().__init__(model)
        n_blocks = model.config.n_blocks
        if not modules or not all(0 <= place <= n_blocks for place in modules):
            raise InvalidArgument(
                f"modules stand before blocks 0 to {n_blocks - 1}, or at {n_blocks} behind the last; found "
                f"{sorted(modules)}"
            )
        self.between = nn.ModuleDict({str(place): modules[place] for place in sorted(modules)})

    @property
    def settings(self) -> dict[str, Any]:
        return {"places": [int(place) for place in self.between]}

    def hidden(self, token_ids: Tensor) -> Tensor:
        hidden, reached = self._model.embed(token_ids), 0
        for place, module in self.between.items():
            if int(place) > reached:
                hidden, reached = self._model.blocks[reached : int(place)](hidden), int(place)
            hidden = module(hidden)
        return self._model.blocks[reached:](hidden) if reached < self._model.config.n_blocks else hidden


class Classifier(nn.Module):
    """A class for each text: a linear layer over the last token's hidden states, normed as the model's head
    has them. `body` is what is tuned beneath; `Tuned(model)` for nothing.
    """

    METHOD = "classifier"

    def __init__(self, body: Tuned, n_classes: int) -> None:
        super().__init__()
        if n_classes < 2:
            raise InvalidArgument(f"a classifier tells two classes apart or more, found {n_classes}")
        self.body = body
        self.n_classes = n_classes
        self.classes = nn.Linear(body.model.config.hidden_size, n_classes)
        nn.init.zeros_(self.classes.weight)

    @property
    def model(self) -> DistributedModel:
        return self.body.model

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "n_classes": self.n_classes,
            "body": self.body.METHOD,
            **{f"body.{name}": value for name, value in self.body.settings.items()},
        }

    def forward(self, token_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """token_ids (B, T), and how many of each row are text (B,), by default all → logits (B, classes)."""
        hidden = self.body.hidden(token_ids)
        ends = torch.full((len(hidden),), hidden.shape[1]) if lengths is None else lengths
        if ends.shape != hidden.shape[:1] or not 0 < int(ends.min()) <= int(ends.max()) <= hidden.shape[1]:
            raise InvalidArgument(
                f"lengths are {len(hidden)} numbers of 1 to {hidden.shape[1]}, found {ends.tolist()[:8]}"
            )
        last = hidden[torch.arange(len(hidden)), ends - 1]
        scores: Tensor = self.classes(self.body.model.norm(last).to(self.classes.weight.dtype))
        return scores


def _checked_count(model: DistributedModel, n_tokens: int) -> int:
    longest = model.config.max_position_embeddings
    if not 0 < n_tokens < longest:
        raise InvalidArgument(f"a prompt has 1 to {longest - 1} tokens in this model, found {n_tokens}")
    return n_tokens


def _embedded(model: DistributedModel, n_tokens: int, text: str | None) -> Tensor:
    """(P, E): of the text, repeated or cut, or of tokens drawn at random."""
    if text is None:
        ids = torch.randint(0, model.config.vocab_size, (n_tokens,))
    else:
        known = model.encode(text)
        if not known:
            raise InvalidArgument("a prompt cannot begin as an empty text")
        ids = torch.tensor([known[index % len(known)] for index in range(n_tokens)])
    return model.embed(ids[None])[0]
