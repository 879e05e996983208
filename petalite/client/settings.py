"""What a user may set of a session."""

from __future__ import annotations

from dataclasses import dataclass

from petalite.errors import InvalidArgument

RING, STAR = ROUTES = ("ring", "star")


@dataclass(frozen=True, slots=True)
class SessionSettings:
    step_s: float = 30.0  # the longest wait for a step's answer; token_s more for each token of it
    token_s: float = 0.25
    hop_s: float = 5.0  # for one server to open its part of the session
    open_s: float = 30.0  # to find a chain and open it, in all, before opening fails
    recovery_s: float = 60.0  # to find and fill a replacement, in all, before the step fails
    chunk_tokens: int = 512  # a longer prefill, or replay, goes in steps of this many
    retry_s: float = 0.05  # pause before a third attempt to open hops; doubles up to two seconds
    route: str = RING  # servers push to each other; STAR: every edge passes the client, who keeps all inputs

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise InvalidArgument(f"route is one of {', '.join(ROUTES)}, found {self.route!r}")
