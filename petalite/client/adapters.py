"""LoRA as calls and sessions name it: by digest, and in the part that a server's blocks need.

An adapter of the client's own is cut to the blocks of each server, so that every server is sent its part
once per version, whatever the chain. Knows tensors by name; knows neither servers nor optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from petalite.errors import InvalidAdapter
from petalite.model.lora import write_adapter
from petalite.swarm.spans import Span
from petalite.swarm.training import adapter_digest


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What servers of some blocks need of a LoRA."""

    digest: bytes
    blob: bytes | None = None  # the file of that digest; None: the server is to have it
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # by name, in the order of their gradients

    @property
    def n_values(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    def split(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Gradients (values,) one behind the other → by name."""
        start = 0
        for name, shape in self.shapes:
            end = start + math.prod(shape)
            yield name, flat[start:end].view(shape)
            start = end


class AdapterSource(Protocol):
    """A LoRA as it is now; what is trained meanwhile is another."""

    @property
    def hosted(self) -> bytes | None:
        """The digest, where servers hold it by themselves."""
        ...

    def __contains__(self, block: object) -> bool: ...

    def part(self, span: Span) -> AdapterPart | None:
        """What a server of `span` needs; None where these blocks are as they were."""
        ...


class HostedAdapter:
    """A LoRA that servers hold (`serve --adapter`), by its digest. It is only read."""

    def __init__(self, digest: bytes) -> None:
        if len(digest) != 32:
            raise InvalidAdapter(f"an adapter's digest has 32 bytes, found {len(digest)}")
        self.hosted: bytes | None = digest

    def __contains__(self, block: object) -> bool:
        return True

    def part(self, span: Span) -> AdapterPart | None:
        assert self.hosted is not None
        return AdapterPart(self.hosted)


class OwnAdapter:
    """A LoRA of the client's: a copy of tensors named `blocks.{index}.{role}.lora_A` and `.lora_B`."""

    hosted: bytes | None = None

    def __init__(self, model_id: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
        self._model_id, self._alpha = model_id, alpha
        self._tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
        }
        self._names: dict[int, list[str]] = {}
        for name in sorted(self._tensors):
            self._names.setdefault(_block_of(name), []).append(name)
        self._parts: dict[Span, AdapterPart] = {}

    def __contains__(self, block: object) -> bool:
        return block in self._names

    def part(self, span: Span) -> AdapterPart | None:
        if span not in self._parts:
            names = sorted(name for block in span.blocks for name in self._names.get(block, ()))
            if not names:
                return None
            tensors = {name: self._tensors[name] for name in names}
            blob = write_adapter(tensors, model=self._model_id, alpha=self._alpha)
            shapes = tuple((name, tuple(self._tensors[name].shape)) for name in names)
            self._parts[span] = AdapterPart(adapter_digest(blob), blob, shapes)
        return self._parts[span]


def _block_of(name: str) -> int:
    head, _, rest = name.partition(".")
    block = rest.partition(".")[0]
    if head != "blocks" or not block.isdigit():
        raise InvalidAdapter(
            f"{name!r} is no tensor of an adapter; expected blocks.INDEX.ROLE.lora_A or lora_B"
        )
    return int(block)
