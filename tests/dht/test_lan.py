"""Real multicast DNS on the loopback interface, where there is zeroconf and the system lets us."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from petalite.dht.lan import LanDiscovery, _addresses
from petalite.dht.net_adapter import HostNetwork
from petalite.dht.node import DhtNode
from petalite.errors import InvalidArgument, Unreachable
from petalite.net import Host, Identity, Multiaddr, PeerId

RULES = {"servers": lambda owner, name, value: None}


async def node_on_lan(
    stack: AsyncExitStack, *, client_mode: bool = False, met: asyncio.Queue[PeerId] | None = None
) -> DhtNode:
    """One more node; it puts whom it has met into the queue."""
    identity = Identity.generate()
    host = await stack.enter_async_context(Host(identity))
    if not client_mode:
        await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
    node = DhtNode(identity, HostNetwork(host), rules=RULES, client_mode=client_mode)
    await stack.enter_async_context(node)
    meet = node.meet

    async def meet_and_tell(address: Multiaddr) -> None:
        await meet(address)
        if met is not None and address.peer_id is not None:
            met.put_nowait(address.peer_id)

    node.meet = meet_and_tell  # type: ignore[method-assign]
    await stack.enter_async_context(LanDiscovery(node, interfaces=["127.0.0.1"]))
    return node


async def test_nodes_on_one_network_find_each_other_without_any_address():
    pytest.importorskip("zeroconf")
    async with AsyncExitStack() as stack:
        try:
            first = await node_on_lan(stack)
        except Unreachable as error:
            pytest.skip(f"no multicast here: {error}")
        second = await node_on_lan(stack)
        met: asyncio.Queue[PeerId] = asyncio.Queue()
        client = await node_on_lan(stack, client_mode=True, met=met)
        await first.announce("servers", "m", b"here", 60)
        async with asyncio.timeout(30):
            missing = {first.peer_id, second.peer_id}
            while missing:
                missing.discard(await met.get())
        assert client.peer_id not in {peer.peer_id for peer in (*first.known_peers(), *second.known_peers())}
        found = await client.find([("servers", "m")], timeout_s=5)
        assert [record.value for record in found["servers", "m"]] == [b"here"]


async def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    monkeypatch.setitem(sys.modules, "zeroconf.asyncio", None)
    async with AsyncExitStack() as stack:
        with pytest.raises(InvalidArgument, match=r"pip install 'petalite\[lan\]'"):
            await node_on_lan(stack)


async def test_who_listens_on_every_interface_is_announced_at_its_own_addresses():
    """And not at loopback, where others would find themselves; ifaddr is the independent witness."""
    ifaddr = pytest.importorskip("ifaddr")
    identity = Identity.generate()
    async with Host(identity) as host:
        (listening,) = await host.listen([Multiaddr.parse("/ip4/0.0.0.0/tcp/0")])
        async with DhtNode(identity, HostNetwork(host), rules=RULES) as node:
            service = LanDiscovery(node)._own_service()
    own = {ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4}
    assert set(service.parsed_addresses()) == own - {"127.0.0.1"}
    assert [address.peer_id for address in _addresses(service)] == [identity.peer_id] * len(
        own - {"127.0.0.1"}
    )
    assert all(address.port == listening.port for address in _addresses(service))


@pytest.mark.parametrize(
    "changes",
    [
        {"properties": {}},
        {"properties": {b"id": None}},
        {"properties": {b"id": b"\xff\xfe"}},
        {"properties": {b"id": b"12D3KooWnobody"}},
        {"port": None},
        {"port": 0},
        {"hosts": ["not an address"]},
        {"hosts": []},
    ],
)
def test_a_service_that_does_not_say_who_or_where_it_is_is_passed_over(changes: dict[str, object]):
    peer = Identity.from_seed(bytes(32)).peer_id
    said = {"properties": {b"id": str(peer).encode()}, "port": 1, "hosts": ["10.0.0.1"]}

    def info(**fields: object) -> SimpleNamespace:
        hosts = fields.pop("hosts")
        return SimpleNamespace(**fields, parsed_addresses=lambda: hosts)

    assert _addresses(info(**said)) == [Multiaddr("ip4", "10.0.0.1", 1, peer)]
    assert _addresses(info(**said | changes)) == []


def test_of_very_many_addresses_a_few_are_tried():
    peer = Identity.from_seed(bytes(32)).peer_id
    info = SimpleNamespace(
        properties={b"id": str(peer).encode()},
        port=1,
        parsed_addresses=lambda: [f"10.0.0.{n}" for n in range(200)],
    )
    assert len(_addresses(info)) == 8


async def test_names_that_are_none_do_not_end_the_search(monkeypatch: pytest.MonkeyPatch):
    """Whoever is on the network can answer with any; zeroconf's own class refuses them."""
    zeroconf_asyncio = pytest.importorskip("zeroconf.asyncio")
    peer = Identity.from_seed(bytes(32)).peer_id
    met: asyncio.Queue[Multiaddr] = asyncio.Queue()

    class Info(zeroconf_asyncio.AsyncServiceInfo):  # type: ignore[misc, name-defined]
        async def async_request(self, *_: object) -> bool:
            self.port = 1
            self._set_properties({b"id": str(peer).encode()})
            self.addresses = [bytes([10, 0, 0, 1])]
            return True

    node = SimpleNamespace(peer_id=None, meet=met.put)
    discovery = LanDiscovery(node)  # type: ignore[arg-type]
    monkeypatch.setattr(discovery._asyncio, "AsyncServiceInfo", Info)
    discovery._zeroconf = SimpleNamespace(zeroconf=None)
    names = ("x._other._tcp.local.", "", "\x00._petalite._tcp.local.", "\ud800._petalite._tcp.local.")
    for name in (*names, "right._petalite._tcp.local."):
        discovery._found.put_nowait(name)
    looking = asyncio.create_task(discovery._look_into_found())
    found = asyncio.create_task(met.get())
    await asyncio.wait([looking, found], return_when=asyncio.FIRST_COMPLETED)
    assert not looking.done(), looking.exception()
    assert (await found).peer_id == peer
    looking.cancel()
