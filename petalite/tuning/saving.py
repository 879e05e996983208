"""Versions of what was tuned: save it with a card, load it by path or digest, go on from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from petalite.client.sync import DistributedModel
from petalite.errors import InvalidAdapter, InvalidArgument
from petalite.model.tensorfile import DTYPES
from petalite.model.versions import Card, Version, find_version, write_version
from petalite.tuning.lora import Lora
from petalite.tuning.modules import Classifier, DeepPrompts, PromptTuning, Tuned


class Tunable(Protocol):
    """Of `petalite.tuning`, or one's own module that says the same of itself."""

    METHOD: ClassVar[str]

    @property
    def model(self) -> DistributedModel: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...


_MAKERS: dict[str, Callable[[DistributedModel, Mapping[str, Any]], Tuned]] = {
    Tuned.METHOD: lambda model, settings: Tuned(model),
    PromptTuning.METHOD: lambda model, settings: PromptTuning(model, settings["n_tokens"]),
    DeepPrompts.METHOD: lambda model, settings: DeepPrompts(model, settings["n_tokens"]),
    Lora.METHOD: lambda model, settings: Lora(
        model, settings["rank"], settings["alpha"], settings["targets"], settings["blocks"]
    ),
}


def save_version(
    folder: str | Path,
    module: Tunable,
    *,
    metrics: Mapping[str, float] | None = None,
    parent: Version | str | None = None,
    note: str = "",
) -> Version:
    """A new file in `folder` with the module's parameters and a card. `parent` is the version that it was
    trained on from.
    """
    digest = parent.digest if isinstance(parent, Version) else parent
    card = Card(module.model.model_id, module.METHOD, module.settings, dict(metrics or {}), digest, note)
    # A LoRA's file is what servers are sent, too (`petalite.model.lora`).
    more = {"model": card.model, "alpha": repr(module.alpha)} if isinstance(module, Lora) else None
    return write_version(folder, module.state_dict(), card, more)


def load_version(
    which: str | Path,
    model: DistributedModel,
    *,
    folder: str | Path | None = None,
    into: nn.Module | None = None,
) -> tuple[Any, Version]:
    """A version by its path or, in a folder, by the beginning of its digest: as a module that goes on where
    it ended, and the version, to name as its children's parent.

    `into` is a module that was made for it; modules of one's own (`Between`) cannot be made from a card.
    Raises InvalidAdapter for another model's, or where tensors and card do not fit.
    """
    version = find_version(which, folder)
    if version.card.model != model.model_id:
        raise InvalidAdapter(
            f"{version.path} is for {version.card.model}, this is {model.model_id}; it means nothing here"
        )
    module = _made(version, model) if into is None else into
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if expected != dict(version.shapes):
        wrong = sorted(
            name for name in {*expected, *version.shapes} if expected.get(name) != version.shapes.get(name)
        )
        raise InvalidAdapter(
            f"{version.path} does not fit what its card says, or the module given: "
            + "; ".join(
                f"{name} has shape {version.shapes.get(name)}, expected {expected.get(name)}"
                for name in wrong[:3]
            )
        )
    module.load_state_dict(_finite(version))
    return module, version


def _made(version: Version, model: DistributedModel) -> nn.Module:
    card = version.card
    try:
        _check_size(version, model)
        if card.method == Classifier.METHOD:
            settings = dict(card.settings)
            body = {
                name.removeprefix("body."): value
                for name, value in settings.items()
                if name.startswith("body.")
            }
            return Classifier(_MAKERS[settings["body"]](model, body), settings["n_classes"])
        return _MAKERS[card.method](model, card.settings)
    except KeyError as error:
        known = ", ".join((*_MAKERS, Classifier.METHOD))
        raise InvalidAdapter(
            f"{version.path} was made by {card.method!r} and lacks {error}; known methods are {known}; give "
            f"others as into=MODULE"
        ) from error
    except (InvalidArgument, TypeError, ValueError, OverflowError) as error:
        raise InvalidAdapter(f"{version.path} has settings that cannot be: {error}") from error


def _check_size(version: Version, model: DistributedModel) -> None:
    """A card makes nobody take more memory than its file has by a factor of the model's blocks."""
    settings = version.card.settings
    values = sum(math.prod(shape) for shape in version.shapes.values())
    for prefix in ("", "body."):
        n_pairs = len(settings.get(prefix + "targets", ())) * len(settings.get(prefix + "blocks", ()))
        asked = {
            "n_tokens": settings.get(prefix + "n_tokens", 0) * model.config.hidden_size,
            "rank": settings.get(prefix + "rank", 0) * n_pairs,
            "n_classes": settings.get("n_classes", 0),
        }
        for name, least in asked.items():
            if least > values:
                raise ValueError(f"{name} is larger than its tensors have room for")


def _finite(version: Version) -> dict[str, Tensor]:
    tensors = version.tensors()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise InvalidAdapter(
                f"{version.path} holds {name!r} in {tensor.dtype}; known are {', '.join(DTYPES)}"
            )
        if not tensor.isfinite().all():
            raise InvalidAdapter(f"{version.path} has NaN or Inf in {name!r}")
    return tensors
