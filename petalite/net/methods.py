"""What peers may call: methods with their handlers, and what their callers may ask for.

Knows names, sizes and rates; knows nothing of how a call comes and goes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeAlias

from petalite.errors import BadMessage, RateLimited, UnknownMethod
from petalite.net.limits import TokenBucket
from petalite.net.messages import Message
from petalite.net.streams import Priority

Reply: TypeAlias = Message | Mapping[str, Any] | None
Handler: TypeAlias = Callable[..., Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class MethodPolicy:
    """What a method's callers may ask for."""

    max_message_bytes: int = 256 * 1024 * 1024  # all buffers of one message
    max_buffers: int = 64  # per message
    max_concurrent: int = 1024  # calls at once, of all peers together
    calls_per_s: float = 5000.0  # of one peer, after a burst of as many
    priority: Priority = Priority.INTERACTIVE  # the highest class in which answers are sent

    def check(self, sizes: Sequence[int], method: str) -> None:
        """Raises BadMessage for buffers of a message that are more than this, before they take memory."""
        if len(sizes) > self.max_buffers or sum(sizes) > self.max_message_bytes:
            raise BadMessage(
                f"a message of {len(sizes)} buffers with {sum(sizes)} bytes; {method or 'a call'} "
                f"takes {self.max_buffers} with {self.max_message_bytes}"
            )


@dataclass(slots=True)
class Method:
    """A served method: its handler and what counts for it."""

    handler: Handler
    request: type | None
    policy: MethodPolicy
    running: int = 0


def admit(methods: Mapping[str, Method], name: str, rates: dict[str, TokenBucket]) -> Method:
    """The method of that name, for a peer that has called at these `rates`. Raises UnknownMethod,
    RateLimited.
    """
    method = methods.get(name)
    if method is None:
        raise UnknownMethod(f"there is no method {name!r} here")
    rate, now = method.policy.calls_per_s, monotonic()
    bucket = rates.get(name)
    if bucket is None:
        bucket = rates[name] = TokenBucket(rate, rate, now)
    if not bucket.take(now):
        raise RateLimited(f"more than {rate:g} calls to {name!r} a second")
    return method
