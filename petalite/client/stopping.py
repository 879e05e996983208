"""Texts that end a generation, looked for in pieces as they come.

What may be the beginning of such a text is held back until it is certain that it is not. Knows text alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from petalite.errors import InvalidArgument

MOST_STOPS = 64


class StopTexts:
    """Ends at whichever of `stops` is complete first, the longest of those that are; it is not given out."""

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops) or len(self._stops) > MOST_STOPS:
            raise InvalidArgument(
                f"stop is a text or up to {MOST_STOPS} of them, none empty; found {self._stops!r:.200}"
            )
        self._held = ""
        self.found: str | None = None

    def step(self, piece: str) -> str:
        """What is certain to come before any stop, now that `piece` has come; nothing once one is found."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        hits = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if hits:
            end, _, self.found = min(hits)
            self._held = ""
            return text[: end - len(self.found)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back; the text is over."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of `text` are the beginning of `stop`, at most; less than all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
