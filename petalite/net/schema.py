"""The typed border: frozen dataclasses to message bodies and back, checked by msgspec.

A field's annotation is its rule: `int`, `Annotated[float, between(…)]`, `str`, `bytes`, `bool`, `PeerId` (32
bytes on the wire), `X | None`, `tuple[X, ...]`, another such dataclass; `between(low, high)` bounds a number,
which a float needs to be finite, and `length(low, high)` text, bytes or a tuple. Nothing is converted to fit.
Keys that the class does not know are ignored, so a newer peer may say more; whatever is missing or of another
type raises BadMessage, which names the field. Knows no bytes: msgpack comes after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from petalite.errors import BadMessage
from petalite.net.identity import PeerId

T = TypeVar("T")


def between(low: float, high: float) -> msgspec.Meta:
    """What a number may be; both ends included, and NaN is between none."""
    return msgspec.Meta(ge=low, le=high)


def length(low: int, high: int) -> msgspec.Meta:
    """How long text, bytes or a tuple may be."""
    return msgspec.Meta(min_length=low, max_length=high)


def encode(message: Any) -> dict[str, Any]:
    """The body of a dataclass instance."""
    body: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,), enc_hook=bytes)
    return body


def decode(cls: type[T], body: Mapping[str, Any]) -> T:
    """The dataclass instance that `body` spells. Raises BadMessage."""
    try:
        return msgspec.convert(body, cls, builtin_types=(bytes,), dec_hook=_peer_id)
    except msgspec.ValidationError as error:
        raise BadMessage(f"{cls.__name__}: {error}") from None


def _peer_id(kind: type, value: Any) -> Any:
    if kind is PeerId and type(value) is bytes and len(value) == PeerId.BYTES:
        return PeerId(value)
    raise ValueError(f"Expected the {PeerId.BYTES} bytes of a {kind.__name__}")
