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
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

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


_ANY, _FINITE = Bounds(-math.inf, math.inf), Bounds(-sys.float_info.max, sys.float_info.max)


class _Mismatch(Exception):
    """What was expected; `decode` adds the field's name on the way out."""


class _Field(NamedTuple):
    name: str
    default: Callable[[], Any] | None  # None: the field is required
    skip_none: bool  # a None that is the default need not travel
    decode: Decoder
    encode: Encoder


def encode(message: Any) -> dict[str, Any]:
    """The body of a dataclass instance."""
    body: dict[str, Any] = {}
    for name, _default, skip_none, _decode, encode_value in _plan(type(message)):  # type: ignore[arg-type]
        value = getattr(message, name)
        if value is not None:
            body[name] = value if encode_value is None else encode_value(value)
        elif not skip_none:
            body[name] = None
    return body


def decode(cls: type[T], body: Mapping[str, Any]) -> T:
    """The dataclass instance that `body` spells. Raises BadMessage."""
    values, name = [], ""
    try:
        for name, default, _skip_none, decode_value, _encode in _plan(cls):  # type: ignore[arg-type]
            value = body.get(name, _MISSING)
            if value is not _MISSING:
                values.append(decode_value(value))
            elif default is not None:
                values.append(default())
            else:
                raise BadMessage(f"{cls.__name__}.{name} is missing")
    except _Mismatch as error:
        raise BadMessage(f"{cls.__name__}.{name}: {error}") from None
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
        rule = _rule(hints[field.name], f"{cls.__name__}.{field.name}", None)
        plan.append(_Field(field.name, default, field.default is None, *rule))
    return tuple(plan)


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _rule(hint: Any, where: str, bounds: Bounds | None) -> tuple[Decoder, Encoder]:
    """How values of this annotation are checked and written."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _rule(arguments[0], where, next((each for each in arguments if type(each) is Bounds), bounds))
    if origin in (Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        return _optional(*_rule(arguments[arguments[0] is type(None)], where, bounds))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple(*_rule(arguments[0], where, None), bounds or _ANY)
    if hint is int or hint is bool:
        return _number(hint, bounds or _ANY), None
    if hint is str or hint is bytes:
        return _text(hint, bounds or _ANY), None
    if hint is float:
        return _float(bounds or _FINITE), None
    if hint is PeerId:
        text = _text(bytes, Bounds(32, 32))
        return lambda value: PeerId(text(value)), lambda value: value.public_key
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _nested(hint), encode
    raise InvalidArgument(f"{where}: a message field cannot be {hint!r}")


def _mismatch(expected: str, bounds: Bounds, value: Any) -> _Mismatch:
    return _Mismatch(f"expected {expected} of {bounds.low:g} to {bounds.high:g}, found {repr(value)[:60]}")


def _number(kind: Any, bounds: Bounds) -> Decoder:
    low, high = bounds.low, bounds.high

    def decoder(value: Any) -> Any:
        if type(value) is not kind or not low <= value <= high:  # a bool is an int to isinstance, not to us
            raise _mismatch(kind.__name__, bounds, value)
        return value

    return decoder


def _text(kind: Any, bounds: Bounds) -> Decoder:
    low, high = bounds.low, bounds.high

    def decoder(value: Any) -> Any:
        if type(value) is not kind or not low <= len(value) <= high:
            raise _mismatch(kind.__name__, bounds, value)
        return value

    return decoder


def _float(bounds: Bounds) -> Decoder:
    def decoder(value: Any) -> float:
        # What is too large for a float is out of bounds, too; NaN is within none.
        if type(value) not in (float, int) or not bounds.low <= value <= bounds.high:
            raise _mismatch("a finite number", bounds, value)
        return float(value)

    return decoder


def _optional(decoder: Decoder, encoder: Encoder) -> tuple[Decoder, Encoder]:
    def decode_optional(value: Any) -> Any:
        return None if value is None else decoder(value)

    if encoder is None:
        return decode_optional, None
    inner = encoder
    return decode_optional, lambda value: None if value is None else inner(value)


def _tuple(decoder: Decoder, encoder: Encoder, bounds: Bounds) -> tuple[Decoder, Encoder]:
    low, high = bounds.low, bounds.high

    def decode_tuple(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or not low <= len(value) <= high:
            raise _mismatch("a list", bounds, value)
        return tuple([decoder(item) for item in value])

    if encoder is None:
        return decode_tuple, list
    inner = encoder
    return decode_tuple, lambda value: [inner(item) for item in value]


def _nested(cls: type) -> Decoder:
    def decode_nested(value: Any) -> Any:
        if type(value) is not dict:
            raise _Mismatch(f"expected a map, found {type(value).__name__}")
        try:
            return decode(cls, value)
        except BadMessage as error:
            raise _Mismatch(str(error)) from None

    return decode_nested
