"""Whether the next pass waits a moment for sessions that are about to come back.

Sessions whose steps find the device busy with each other's alternate for ever, each pass over the weights
serving some of them. A wait for whoever was just answered, and comes back sooner than another pass takes,
puts them into one: what it costs is less than the pass that it saves. Sessions that take longer to come
back (a far client, a slow reader) are not waited for. A pure core; it reads no clock.
"""

from __future__ import annotations

from collections.abc import Hashable

SHARE = 0.75  # of a pass's usual time: no pass waits longer, nor for who is usually away longer
SLACK = 3.0  # a session is waited for so many times its usual time
WEIGHT = 0.5  # of the last time in what is usual: sessions that meet anew share passes after two steps


class Gathering:
    """Sessions are named by whatever the caller likes."""

    def __init__(self) -> None:
        self._answered: dict[Hashable, tuple[float, Hashable]] = {}  # of those that have not come back
        self._usual_s: dict[Hashable, float] = {}  # from an answer to the next step
        self._pass_s = 0.0
        self._since_s: float | None = None  # when there was first something to do for an idle device

    def came(self, session: Hashable, now_s: float) -> None:
        """Its next step is here."""
        answered = self._answered.pop(session, None)
        if answered is not None:
            away_s = now_s - answered[0]
            if self._pass_s:  # a pause says no more than any other time that is too long to wait for
                away_s = min(away_s, self._pass_s)
            usual_s = self._usual_s.get(session, away_s)
            self._usual_s[session] = usual_s + WEIGHT * (away_s - usual_s)

    def answered(self, session: Hashable, now_s: float, group: Hashable = None) -> None:
        """Its next step may share a pass with others of its `group`."""
        self._answered[session] = now_s, group

    def left(self, session: Hashable) -> None:
        """It is over."""
        self._answered.pop(session, None)
        self._usual_s.pop(session, None)

    @property
    def anybody(self) -> bool:
        """Whether anybody who was answered is still away."""
        return bool(self._answered)

    def began(self) -> None:
        """A pass, of whatever kind: the device is idle no more."""
        self._since_s = None

    def passed(self, seconds: float) -> None:
        """What a pass of decode steps alone took."""
        self._pass_s += (seconds - self._pass_s) / 4 if self._pass_s else seconds

    def wait_s(self, now_s: float, group: Hashable = None) -> float:
        """How long the device, which is idle and has something to do, had better wait now: for sessions of
        `group`, whose steps are to be computed next, or for all, where that is something long.
        """
        if self._since_s is None:
            self._since_s = now_s
        most_s = SHARE * self._pass_s
        due_s = [
            answered_s + SLACK * usual_s
            for session, (answered_s, its_group) in self._answered.items()
            if (group is None or its_group == group)
            and (usual_s := self._usual_s.get(session, float("inf"))) <= most_s
        ]
        return max(0.0, min(max(due_s, default=0.0), self._since_s + most_s) - now_s)
