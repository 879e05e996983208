"""The lab's arithmetic, against sums that are done here by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lab.core import HostSpec, Network, address_of


def packet(sender: int, receiver: int, size: int = 1000, number: int = 0) -> bytes:
    """An IPv4 packet, so far as the network looks at it."""
    addresses = b"".join(bytes(map(int, address_of(host).split("."))) for host in (sender, receiver))
    return (b"\x45" + bytes(11) + addresses + number.to_bytes(4, "big")).ljust(size, b"\0")


def arrivals(network: Network) -> list[tuple[float, int, bytes]]:
    """(when, to whom, what), of all that is on its way."""
    found = []
    while network.next_at < math.inf:
        at = network.next_at
        found += [(at, host, data) for host, data in network.advance(at)]
    return found


def test_delays_of_both_links_add_up() -> None:
    network = Network([HostSpec("a", delay_s=0.03), HostSpec("b", delay_s=0.02)])
    network.send(0, packet(0, 1), now=5.0)
    network.send(1, packet(1, 0), now=6.0)
    assert [(pytest.approx(at), host) for at, host, _ in arrivals(network)] == [(5.05, 1), (6.05, 0)]


def test_the_rate_spaces_packets_and_the_narrower_link_holds_them_back() -> None:
    """1000 bytes take 8 ms at 1 Mbit/s, and 0.8 ms at ten times that."""
    network = Network([HostSpec("a", rate_bits_s=1e7), HostSpec("b", rate_bits_s=1e6)])
    for _ in range(3):
        network.send(0, packet(0, 1), now=0.0)
    assert [at for at, _, _ in arrivals(network)] == pytest.approx([0.0088, 0.0168, 0.0248])


def test_directions_do_not_hold_each_other_back() -> None:
    network = Network([HostSpec("a", rate_bits_s=1e6), HostSpec("b")])
    network.send(0, packet(0, 1), now=0.0)
    network.send(1, packet(1, 0), now=0.0)
    assert [at for at, _, _ in arrivals(network)] == pytest.approx([0.008, 0.008])


def test_a_full_queue_drops() -> None:
    """Each takes 8 ms; the first five wait 0 to 32 ms, and the sixth would wait 40."""
    network = Network([HostSpec("a", rate_bits_s=1e6, queue_s=0.035), HostSpec("b")])
    for number in range(9):
        network.send(0, packet(0, 1, number=number), now=0.0)
    assert len(arrivals(network)) == 5
    counts = network.counts(0)["sent"]
    assert (counts["passed"], counts["passed_bytes"], counts["overflowed"]) == (5, 5000, 4)


def test_loss_is_a_share_on_each_link() -> None:
    """1 - 0.9 · 0.8 of 10,000 packets is 2,800; four standard deviations are 180."""
    network = Network([HostSpec("a", loss=0.1), HostSpec("b", loss=0.2)])
    for _ in range(10_000):
        network.send(0, packet(0, 1, 40), now=0.0)
    assert 10_000 - len(arrivals(network)) == pytest.approx(2_800, abs=180)


def test_jitter_spreads_and_keeps_the_order() -> None:
    network = Network([HostSpec("a", delay_s=0.05, jitter_s=0.02), HostSpec("b")])
    for number in range(1000):
        network.send(0, packet(0, 1, number=number), now=number)
    found = arrivals(network)
    late_s = [at - number - 0.05 for number, (at, _, _) in enumerate(found)]
    assert min(late_s) > -1e-6 and max(late_s) < 0.02 + 1e-6
    assert sum(late_s) / len(late_s) == pytest.approx(0.01, abs=0.001)
    for number in range(1000):
        network.send(0, packet(0, 1, number=number), now=2000 + number / 1e6)
    assert [int.from_bytes(data[20:24], "big") for _, _, data in arrivals(network)] == list(range(1000))


def test_the_same_seed_loses_the_same() -> None:
    def survivors(seed: int) -> list[bytes]:
        network = Network([HostSpec("a", loss=0.5), HostSpec("b")], seed)
        for number in range(100):
            network.send(0, packet(0, 1, number=number), now=0.0)
        return [data for _, _, data in arrivals(network)]

    assert survivors(1) == survivors(1) != survivors(2)


@pytest.mark.parametrize("end", [0, 1])
def test_a_cut_link_passes_nothing_nor_what_was_on_it(end: int) -> None:
    network = Network([HostSpec("a", delay_s=1.0), HostSpec("b", delay_s=1.0), HostSpec("c")])
    network.send(0, packet(0, 1), now=0.0)
    network.cut(end)
    network.send(0, packet(0, 1), now=0.5)
    network.send(2, packet(2, 1 - end), now=0.5)
    assert [(at, host) for at, host, _ in arrivals(network)] == [(1.5, 1 - end)]
    network.heal(end)
    network.send(0, packet(0, 1), now=10.0)
    assert [at for at, _, _ in arrivals(network)] == [12.0]


def test_figures_change_while_it_runs() -> None:
    network = Network([HostSpec("a", delay_s=0.1), HostSpec("b")])
    network.change(0, delay_s=0.4, rate_bits_s=1e6)
    network.send(0, packet(0, 1), now=0.0)
    assert [at for at, _, _ in arrivals(network)] == pytest.approx([0.408])
    with pytest.raises(ValueError, match="a share"):
        network.change(0, loss=1.5)


@pytest.mark.parametrize(
    "data", [packet(0, 7), b"\x60" + bytes(39), b"\x45" + bytes(19)], ids=["nobody", "IPv6", "nowhere"]
)
def test_what_goes_to_no_host_goes_nowhere(data: bytes) -> None:
    network = Network([HostSpec("a"), HostSpec("b")])
    network.send(0, data, now=0.0)
    assert arrivals(network) == []


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(40, 1500), st.floats(0, 0.02))),
    st.tuples(*(st.sampled_from([1e5, 1e6, math.inf]) for _ in range(3))),
    st.sampled_from([0.0, 0.2]),
)
def test_nothing_is_made_up_early_or_uncounted(
    sent: list[tuple[int, int, int, float]], rates: tuple[float, ...], loss: float
) -> None:
    """What arrives was sent, once, and no earlier than delays and rates allow; the rest is counted."""
    network = Network([HostSpec(str(n), 0.01, 0.005, rate, 0.05, loss) for n, rate in enumerate(rates)])
    now, sent_at, found = 0.0, list[float](), list[tuple[float, int, bytes]]()
    for number, (sender, receiver, size, wait_s) in enumerate(sent):
        now += wait_s
        found += [(now, host, data) for host, data in network.advance(now)]
        network.send(sender, packet(sender, receiver, size, number), now)
        sent_at.append(now)
    found += arrivals(network)
    numbers = [int.from_bytes(data[20:24], "big") for _, _, data in found]
    assert len(set(numbers)) == len(numbers)
    for number, (at, host, _) in zip(numbers, found, strict=True):
        sender, receiver, size, _ = sent[number]
        assert host == receiver
        least_s = 0.02 + size * 8 / rates[sender] + size * 8 / rates[receiver]
        assert at >= sent_at[number] + least_s - 1e-9
    counts = [network.counts(host)[way] for host in range(3) for way in ("sent", "received")]
    dropped = sum(count["lost"] + count["overflowed"] + count["cut"] for count in counts)
    assert len(found) + dropped == len(sent)
