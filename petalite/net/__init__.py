"""Bytes between peers: identity, addresses, handshake, records, frames, streams, RPC. Knows no tensor."""

from petalite.net.host import Host, HostSettings
from petalite.net.identity import Identity, PeerId
from petalite.net.messages import Message
from petalite.net.methods import MethodPolicy
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Call
from petalite.net.streams import Priority

__all__ = [
    "Call",
    "Host",
    "HostSettings",
    "Identity",
    "Message",
    "MethodPolicy",
    "Multiaddr",
    "PeerId",
    "Priority",
]
