"""What users give by name, looked at before it is computed with."""

from __future__ import annotations

from numbers import Integral, Real

from petalite.errors import InvalidArgument


def check_whole(**values: object) -> None:
    """Raises InvalidArgument for what is no whole number, 2.0 and "2" included."""
    _check(Integral, "a whole number", values)


def check_numbers(**values: object) -> None:
    """Raises InvalidArgument for what is no number."""
    _check(Real, "a number", values)


def _check(kind: type, what: str, values: dict[str, object]) -> None:
    for name, value in values.items():
        if not isinstance(value, kind):
            raise InvalidArgument(f"{name} is {what}, found {value!r}")
