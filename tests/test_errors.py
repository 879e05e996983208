"""The exception tree: codes are unique, survive the wire, and never come back as another class."""

from __future__ import annotations

import math

import pytest

from petalite import errors
from petalite.errors import ErrorCode, PetaliteError, RemoteError, code_of, from_wire


def subclasses(cls: type[PetaliteError]) -> list[type[PetaliteError]]:
    return [sub for child in cls.__subclasses__() for sub in (child, *subclasses(child))]


WITH_OWN_CODE = [cls for cls in subclasses(PetaliteError) if "code" in vars(cls)]


def test_no_two_classes_share_a_code() -> None:
    codes = [cls.code for cls in WITH_OWN_CODE]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", WITH_OWN_CODE, ids=lambda cls: cls.__name__)
def test_a_code_comes_back_as_its_class(cls: type[PetaliteError]) -> None:
    error = from_wire(cls.code, "what was found")
    assert type(error) is cls
    assert str(error) == "what was found"
    assert code_of(error) is cls.code


def test_busy_says_when_to_try_again() -> None:
    error = errors.Busy("full", retry_after_s=7.5)
    back = from_wire(error.code, str(error), error.details())
    assert isinstance(back, errors.Busy)
    assert back.retry_after_s == 7.5
    assert errors.Busy("never").details() == {}


@pytest.mark.parametrize(
    "lie", [{}, {"retry_after_s": "x"}, {"retry_after_s": -1.0}, {"retry_after_s": math.nan}]
)
def test_wrong_details_count_as_absent(lie: dict[str, object]) -> None:
    back = from_wire(ErrorCode.BUSY, "full", lie)
    assert isinstance(back, errors.Busy)
    assert back.retry_after_s is None


def test_a_finer_local_class_travels_as_its_parent() -> None:
    assert code_of(errors.WrongPeer("x")) is ErrorCode.PROTOCOL
    assert type(from_wire(ErrorCode.PROTOCOL, "x")) is errors.RemoteProtocolError


@pytest.mark.parametrize("code", [1, 0xFFFF_FFFF, 77])
def test_an_unknown_code_is_a_plain_remote_error(code: int) -> None:
    error = from_wire(code, "")
    assert type(error) is RemoteError
    assert str(code) in str(error)


def test_foreign_exceptions_travel_as_internal() -> None:
    assert code_of(KeyError("x")) is ErrorCode.INTERNAL
