"""Delays against arithmetic; loss, partitions and death against what the caller sees."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from petalite.dht.contacts import Contact
from petalite.dht.network import Caller
from petalite.errors import BadRecord, DeadlineExceeded, UnknownMethod, WrongPeer
from petalite.net.identity import Identity
from petalite.sim.loop import run
from petalite.sim.network import Endpoint, LinkSettings, SimNetwork


def two(network: SimNetwork) -> tuple[Endpoint, Endpoint, Contact]:
    """Two endpoints, and the second as a contact; it answers with the caller's address and what was said."""
    first, second = (
        network.endpoint(Identity.from_seed(bytes([n]) * 32).peer_id, f"/ip4/5.6.7.{n}/tcp/1") for n in (1, 2)
    )

    async def echo(caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"from": str(caller.address), "said": body["say"]}

    second.serve("echo", echo)
    return first, second, Contact(second.peer_id, second.addresses)


async def timed_call(source: Endpoint, target: Contact, say: bytes = b"hi", timeout_s: float = 3.0) -> float:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    answer = await source.call(target, "echo", {"say": say}, timeout_s=timeout_s)
    assert answer == {"from": str(source.address), "said": say}
    return loop.time() - started_s


def test_a_call_takes_two_latencies():
    async def main() -> None:
        first, _, contact = two(SimNetwork(1, LinkSettings(latency_s=0.05)))
        assert await timed_call(first, contact) == pytest.approx(0.1)

    run(main())


def test_latency_may_depend_on_who_talks_to_whom():
    async def main() -> None:
        network = SimNetwork(
            1, latency_s=lambda source, target: 0.01 if source.addresses[0] > "/ip4/5.6.7.1x" else 0.2
        )
        first, _, contact = two(network)
        assert await timed_call(first, contact) == pytest.approx(0.21)

    run(main())


def test_bandwidth_delays_by_size_and_messages_queue():
    async def main() -> None:
        network = SimNetwork(1, LinkSettings(latency_s=0.0, bandwidth_bytes_s=1000))
        first, _, contact = two(network)
        alone_s = await timed_call(first, contact, bytes(1000), timeout_s=60)
        assert 2.0 < alone_s < 2.3  # there and back
        together = [timed_call(first, contact, bytes(1000), timeout_s=60) for _ in range(3)]
        times = await asyncio.gather(*together)
        assert times[2] > times[0] + 2.0

    run(main())


def test_jitter_and_loss_only_delay_as_under_tcp():
    async def main() -> None:
        first, _, contact = two(SimNetwork(1, LinkSettings(latency_s=0.05, jitter_s=0.02, loss=0.3)))
        times = [await timed_call(first, contact, timeout_s=100) for _ in range(300)]
        assert min(times) >= 0.1
        on_time = sum(t < 0.15 for t in times)
        assert on_time == pytest.approx(0.7 * 0.7 * 300, abs=40)

    run(main())


@pytest.mark.parametrize("how", ["down", "removed", "split", "elsewhere"])
def test_nobody_there_is_silence(how: str):
    async def main() -> None:
        network = SimNetwork(1)
        first, second, contact = two(network)
        if how == "down":
            second.down()
        elif how == "removed":
            network.remove(second)
        elif how == "split":
            network.split({second.peer_id: 1})
        else:
            contact = Contact(second.peer_id, ("/ip4/9.9.9.9/tcp/1",))
        loop = asyncio.get_running_loop()
        with pytest.raises(DeadlineExceeded):
            await timed_call(first, contact, timeout_s=3)
        assert loop.time() == pytest.approx(3.0)
        if how == "split":
            network.split({})
            await timed_call(first, contact)

    run(main())


def test_errors_of_the_peer_come_back_as_their_class():
    async def refuse(caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        raise BadRecord("no")

    async def main() -> None:
        first, second, contact = two(SimNetwork(1))
        second.serve("refuse", refuse)
        with pytest.raises(BadRecord, match="no"):
            await first.call(contact, "refuse", {}, timeout_s=1)
        with pytest.raises(UnknownMethod):
            await first.call(contact, "nothing", {}, timeout_s=1)

    run(main())


def test_a_bug_in_a_handler_surfaces_at_the_call():
    async def broken(caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        raise ZeroDivisionError

    async def main() -> None:
        first, second, contact = two(SimNetwork(1))
        second.serve("broken", broken)
        with pytest.raises(ZeroDivisionError):
            await first.call(contact, "broken", {}, timeout_s=1)

    run(main())


def test_dialling_checks_who_is_there():
    async def main() -> None:
        first, second, _ = two(SimNetwork(1))
        assert await first.dial(second.address, timeout_s=1) == second.peer_id
        assert await first.dial(second.address.with_peer(second.peer_id), timeout_s=1) == second.peer_id
        with pytest.raises(WrongPeer):
            await first.dial(second.address.with_peer(first.peer_id), timeout_s=1)

    run(main())


def test_traffic_is_counted():
    async def main() -> None:
        network = SimNetwork(1)
        first, _second, contact = two(network)
        await timed_call(first, contact, bytes(100))
        assert (network.traffic.calls, network.traffic.messages) == (1, 2)
        assert 200 < network.traffic.bytes < 400
        assert first.calls == {"echo": 1}

    run(main())
