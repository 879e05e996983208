"""Chat templates: messages to the one text that a model was trained to read.

A template comes with the checkpoint and is a program; it runs in the metered sandbox, sees plain JSON
values only, and its failures are one sentence. Knows messages and text; knows no tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.model.sandbox import MeteredEnvironment, RenderLimits

_LIMITS = RenderLimits()
_DATE_FORMAT = re.compile(r"[^0-9]{0,64}")  # strftime takes widths too


class _Refused(jinja2.TemplateError):
    """The template's own `raise_exception`."""


class ChatTemplate:
    """A template, compiled when it is first needed, with the special tokens that it may name (`bos_token`,
    …).
    """

    def __init__(
        self, text: str, tokens: Mapping[str, str] | None = None, *, limits: RenderLimits = _LIMITS
    ) -> None:
        self._text = text
        self._tokens = dict(tokens or {})
        self._environment = MeteredEnvironment(limits)
        self._environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        self._compiled: jinja2.Template | None = None
        self._lock = threading.Lock()  # the environment meters one rendering at a time

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the model reads it, by default up to where the assistant is to speak.

        Raises InvalidArgument for messages that the template refuses or cannot work with, InvalidCheckpoint
        for a template that is broken, tries what it must not, or does not come to an end.
        """
        variables = {
            "messages": _plain(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        with self._lock:
            try:
                if self._compiled is None:
                    self._compiled = self._environment.load(self._text)
                return self._environment.render(self._compiled, variables)
            except _Refused as error:
                raise InvalidArgument(f"the chat template refuses these messages: {error.message}") from error
            except jinja2.TemplateSyntaxError as error:
                raise InvalidCheckpoint(f"the chat template is broken: {error.message}") from error
            except SecurityError as error:
                raise InvalidCheckpoint(f"the chat template was stopped: {error.message}") from error
            except (RecursionError, MemoryError) as error:
                raise InvalidCheckpoint(
                    "the chat template was stopped: it calls itself without end"
                ) from error
            except Exception as error:  # a template can run into any
                raise InvalidArgument(f"the chat template failed on these messages: {error}") from error


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as fresh JSON values: a template never gets hold of the caller's objects."""
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidArgument('messages are a list of objects such as {"role": "user", "content": "Hello"}')
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"messages may hold only what JSON can: {error}") from error
    return plain


def _refuse(message: object = "no reason given") -> NoReturn:
    raise _Refused(str(message)[:500])


def _strftime_now(format: str) -> str:
    if not _DATE_FORMAT.fullmatch(format):
        raise SecurityError("it asks for the date in too long a format")
    return datetime.now().strftime(format)
