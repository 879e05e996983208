"""What a user may set of a session."""

from __future__ import annotations

from dataclasses import dataclass

from petalite.errors import InvalidArgument
from petalite.net.identity import PeerId
from petalite.swarm.messages import MAX_STEP_TOKENS

RING, STAR = ROUTES = ("ring", "star")
CODECS = ("f32", "bf16", "f16", "q8")  # `swarm.codecs`, which loads torch
WIRES = (*CODECS, *(f"{codec}+zstd" for codec in CODECS))
LATENCY, THROUGHPUT = AIMS = ("latency", "throughput")


@dataclass(frozen=True, slots=True)
class Routing:
    """How chains are chosen."""

    route: str = RING  # servers push to each other; STAR: every edge passes the client, who keeps all inputs
    aim: str = LATENCY  # the fastest chain for a step; THROUGHPUT: any, the faster ones more often
    allowed: frozenset[PeerId] | None = None  # no other servers; None: all
    blocked: frozenset[PeerId] = frozenset()

    def __post_init__(self) -> None:
        for name, value, known in (("route", self.route, ROUTES), ("aim", self.aim, AIMS)):
            if value not in known:
                raise InvalidArgument(f"{name} is one of {', '.join(known)}, found {value!r}")

    def permits(self, peer: PeerId) -> bool:
        return peer not in self.blocked and (self.allowed is None or peer in self.allowed)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    step_s: float = 30.0  # the longest wait for a step's answer; token_s more for each token of it
    token_s: float = 0.25
    hop_s: float = 5.0  # for one server to open its part of the session
    open_s: float = 30.0  # to find a chain and open it, in all, before opening fails
    recovery_s: float = 60.0  # to find a replacement that can be filled, in all, before the step fails
    chunk_tokens: int = 512  # a longer prefill, or replay, goes in steps of this many
    retry_s: float = 0.05  # pause before a third attempt to open hops; doubles up to two seconds
    # Codec between machines: "q8" rounds at every edge, "q8+zstd" packs it; None: loses nothing.
    wire: str | None = None

    def __post_init__(self) -> None:
        if self.wire is not None and self.wire not in WIRES:
            raise InvalidArgument(f"wire is one of {', '.join(WIRES)}, found {self.wire!r}")
        if not 1 <= self.chunk_tokens <= MAX_STEP_TOKENS:
            raise InvalidArgument(
                f"chunk_tokens is from 1 to {MAX_STEP_TOKENS}, what servers take in a step; found "
                f"{self.chunk_tokens}"
            )


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Of forward and backward passes over whole batches."""

    part_tokens: int = 1024  # a batch goes through the chain in parts of at most about so many, or one row
    # Parts under way at once; a batch has about as many where that leaves them large enough.
    in_flight: int = 8
    call_s: float = 30.0  # the longest wait for a server's answer; token_s more for each token under way
    token_s: float = 0.02
    recovery_s: float = 60.0  # without progress, from a failure until the pass fails
    retry_s: float = 0.05  # pause before a third attempt at the same blocks; doubles up to five seconds
    pass_s: float = 900.0  # for one forward or backward pass, in all
    wire: str = "f32"  # codec of hidden states and their gradients; others round at every edge

    def __post_init__(self) -> None:
        if self.wire not in CODECS:
            raise InvalidArgument(f"wire is one of {', '.join(CODECS)}, found {self.wire!r}")
        if self.part_tokens < 1 or self.in_flight < 1:
            raise InvalidArgument("part_tokens and in_flight are 1 or more")
