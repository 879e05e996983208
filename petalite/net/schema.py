"""The typed border: frozen dataclasses to message bodies and back.

A field's annotation is its rule: `int`, `float` (finite), `str`, `bytes`, `bool`, `PeerId` (32 bytes on the
wire), `X | None`, `tuple[X, ...]`, another such dataclass; `Annotated[X, Bounds(low, high)]` bounds a
number's value, or the length of text, bytes or a tuple. Keys that the class does not know are ignored, so a
newer peer may say more; whatever is missing or of another type raises BadMessage, which names the field. The
plan of a class is made once. Knows no bytes: msgpack comes after.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from petalite.errors import BadMessage, InvalidArgument
from petalite.net.identity import PeerId

T = TypeVar("T")
Decoder = Callable[[Any], Any]
Encoder = Callable[[Any], Any] | None  # None: the value is its own encoding
_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be, or how long text, bytes or a tuple may be; both ends included."""

    low: float  # the least
    high: float  # the most


class _Mismatch(Exception):
    """What was expected; `decode` adds the field's name on the way out."""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    default: Callable[[], Any] | None  # None: the field is required
    skip_none: bool  # a None that is the default need not travel
    decode: Decoder
    encode: Encoder


def encode(message: Any) -> dict[str, Any]:
    """The body of a dataclass instance."""
    body: dict[str, Any] = {}
    for field in _plan(type(message)):  # type: ignore[arg-type]
        value = getattr(message, field.name)
        if value is None:
            if not field.skip_none:
                body[field.name] = None
        else:
            body[field.name] = value if field.encode is None else field.encode(value)
    return body


def decode(cls: type[T], body: Mapping[str, Any]) -> T:
    """The dataclass instance that `body` spells. Raises BadMessage."""
    values = []
    for field in _plan(cls):  # type: ignore[arg-type]
        value = body.get(field.name, _MISSING)
        if value is _MISSING:
            if field.default is None:
                raise BadMessage(f"{cls.__name__}.{field.name} is missing")
            values.append(field.default())
            continue
        try:
            values.append(field.decode(value))
        except _Mismatch as error:
            raise BadMessage(f"{cls.__name__}.{field.name}: {error}") from None
    return cls(*values)


@cache
def _plan(cls: Any) -> tuple[_Field, ...]:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise InvalidArgument(f"{cls!r} is not a dataclass")
    hints = get_type_hints(cls, include_extras=True)
    plan = []
    for field in dataclasses.fields(cls):
        default: Callable[[], Any] | None = None
        if field.default is not dataclasses.MISSING:
            default = _constant(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory
        decoder, encoder = _rule(hints[field.name], f"{cls.__name__}.{field.name}")
        plan.append(_Field(field.name, default, field.default is None, decoder, encoder))
    return tuple(plan)


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _rule(hint: Any, where: str) -> tuple[Decoder, Encoder]:
    """How values of this annotation are checked and written."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        decoder, encoder = _rule(arguments[0], where)
        for bounds in arguments[1:]:
            if isinstance(bounds, Bounds):
                decoder = _bounded(decoder, bounds)
        return decoder, encoder
    if origin in (Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        inner = arguments[0] if arguments[1] is type(None) else arguments[1]
        return _optional(*_rule(inner, where))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple(*_rule(arguments[0], where))
    if hint in _SCALARS:
        return _SCALARS[hint]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _nested(hint)
    raise InvalidArgument(f"{where}: a message field cannot be {hint!r}")


def _exactly(kind: type) -> Decoder:
    def decoder(value: Any) -> Any:
        if type(value) is not kind:  # a bool is an int to isinstance, and not to us
            raise _Mismatch(f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    return decoder


def _decode_float(value: Any) -> float:
    if type(value) not in (float, int):
        raise _Mismatch(f"expected a number, found {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Mismatch("expected a finite number")
    return number


def _decode_peer_id(value: Any) -> PeerId:
    if type(value) is not bytes or len(value) != 32:
        raise _Mismatch("expected the 32 bytes of a peer's key")
    return PeerId(value)


_SCALARS: dict[Any, tuple[Decoder, Encoder]] = {
    int: (_exactly(int), None),
    str: (_exactly(str), None),
    bytes: (_exactly(bytes), None),
    bool: (_exactly(bool), None),
    float: (_decode_float, None),
    PeerId: (_decode_peer_id, lambda value: value.public_key),
}


def _bounded(decoder: Decoder, bounds: Bounds) -> Decoder:
    low, high = bounds.low, bounds.high

    def bounded(value: Any) -> Any:
        value = decoder(value)
        if isinstance(value, int | float):
            if not low <= value <= high:
                raise _Mismatch(f"{value} is not within {low} to {high}")
        elif value is not None and not low <= len(value) <= high:
            raise _Mismatch(f"a length of {len(value)} is not within {low} to {high}")
        return value

    return bounded


def _optional(decoder: Decoder, encoder: Encoder) -> tuple[Decoder, Encoder]:
    def decode_optional(value: Any) -> Any:
        return None if value is None else decoder(value)

    if encoder is None:
        return decode_optional, None
    inner = encoder
    return decode_optional, lambda value: None if value is None else inner(value)


def _tuple(decoder: Decoder, encoder: Encoder) -> tuple[Decoder, Encoder]:
    def decode_tuple(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _Mismatch(f"expected a list, found {type(value).__name__}")
        return tuple([decoder(item) for item in value])

    if encoder is None:
        return decode_tuple, list
    inner = encoder
    return decode_tuple, lambda value: [inner(item) for item in value]


def _nested(cls: type) -> tuple[Decoder, Encoder]:
    def decode_nested(value: Any) -> Any:
        if type(value) is not dict:
            raise _Mismatch(f"expected a map, found {type(value).__name__}")
        try:
            return decode(cls, value)
        except BadMessage as error:
            raise _Mismatch(str(error)) from None

    return decode_nested, encode
