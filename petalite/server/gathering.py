"""Whether the next pass waits a moment for sessions that are about to come back.

Two sessions whose steps find the device busy with the other's alternate for ever, each pass over the
weights serving one of them. A short wait for whoever was just answered, and usually comes back at once,
puts them into one pass. A pure core; it reads no clock. Sessions that take long to come back (a far client,
a slow reader) are not waited for.
"""

from __future__ import annotations

from collections.abc import Hashable

SHARE = 0.25  # of a pass's usual time: no pass waits longer
SLACK = 1.5  # a session is waited for so many times its usual time


class Gathering:
    """Sessions are named by whatever the caller likes."""

    def __init__(self) -> None:
        self._answered: dict[Hashable, float] = {}  # when, of those that have not come back
        self._usual_s: dict[Hashable, float] = {}  # from an answer to the next step
        self._pass_s = 0.0
        self._since_s: float | None = None  # when there was first something to do for an idle device

    def came(self, session: Hashable, now_s: float) -> None:
        """Its next step is here."""
        answered_s = self._answered.pop(session, None)
        if answered_s is not None:
            away_s = now_s - answered_s
            usual_s = self._usual_s.get(session, away_s)
            self._usual_s[session] = usual_s + (away_s - usual_s) / 4

    def answered(self, session: Hashable, now_s: float) -> None:
        self._answered[session] = now_s

    def left(self, session: Hashable) -> None:
        """It is over."""
        self._answered.pop(session, None)
        self._usual_s.pop(session, None)

    def passed(self, seconds: float) -> None:
        """What a pass took."""
        self._since_s = None
        self._pass_s += (seconds - self._pass_s) / 4 if self._pass_s else seconds

    def wait_s(self, now_s: float) -> float:
        """How long the device, which is idle and has something to do, had better wait now."""
        if self._since_s is None:
            self._since_s = now_s
        most_s = SHARE * self._pass_s
        due_s = [
            answered_s + SLACK * usual_s
            for session, answered_s in self._answered.items()
            if SLACK * (usual_s := self._usual_s.get(session, float("inf"))) <= most_s
        ]
        return max(0.0, min(max(due_s, default=0.0), self._since_s + most_s) - now_s)
