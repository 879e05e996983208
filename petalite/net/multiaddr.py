"""Where a peer is: libp2p multiaddrs in text, for the transports petalite has.

    /ip4/1.2.3.4/tcp/31330/p2p/12D3Koo…        also /ip6, /dns, /dns4, /dns6; the peer id may be absent
    /ip4/…/tcp/…/p2p/RELAY/p2p-circuit/p2p/ID  through a relay

(https://github.com/libp2p/specs/blob/master/addressing/README.md). What parses is in one canonical spelling,
so equal addresses compare equal. Knows text only; resolves no name and opens no socket.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from petalite.errors import InvalidAddress
from petalite.net.identity import PeerId

_MAX_LENGTH = 512
# A host name of RFC 1123: labels of letters, digits and inner hyphens; '_' is met in the wild and harmless.
_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_EXAMPLE = "/ip4/1.2.3.4/tcp/31330/p2p/12D3Koo…"


def _canonical_host(protocol: str, host: str) -> str:
    if protocol == "ip4":
        return str(ipaddress.IPv4Address(host))
    if protocol == "ip6":
        return str(ipaddress.IPv6Address(host))
    if not _HOST_NAME.fullmatch(host):
        raise ValueError("not a host name")
    return host.lower()


@dataclass(frozen=True, slots=True)
class Multiaddr:
    """One address. Where `relay` is set, the peer is reached through the relay at host and port."""

    protocol: str  # ip4, ip6, dns, dns4 or dns6
    host: str
    port: int  # TCP; 0 only in an address to listen on
    peer_id: PeerId | None = None
    relay: PeerId | None = None

    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """Raises InvalidAddress, which quotes what was found and shows what an address looks like."""
        shown = text if len(text) <= 120 else text[:120] + "…"
        if len(text) > _MAX_LENGTH:
            raise InvalidAddress(f"{shown!r} is longer than an address can be ({_MAX_LENGTH} characters)")
        parts = text.split("/")
        if len(parts) < 5 or parts[0] or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6"):
            raise InvalidAddress(f"{shown!r} is not an address; expected one like {_EXAMPLE}")
        protocol, host, transport, port_text, *rest = parts[1:]
        if transport != "tcp":
            raise InvalidAddress(f"{shown!r} uses {transport!r}; petalite dials tcp, as in {_EXAMPLE}")
        try:
            host = _canonical_host(protocol, host)
        except ValueError as error:
            raise InvalidAddress(f"{shown!r}: {host!r} is not a valid {protocol} host") from error
        if not re.fullmatch(r"[0-9]{1,5}", port_text) or int(port_text) > 65535:
            raise InvalidAddress(f"{shown!r}: {port_text!r} is not a TCP port (0 to 65535)")
        address = cls(protocol, host, int(port_text))
        match rest:
            case []:
                return address
            case ["p2p", peer]:
                return replace(address, peer_id=PeerId.parse(peer))
            case ["p2p", relay, "p2p-circuit", "p2p", peer]:
                return replace(address, peer_id=PeerId.parse(peer), relay=PeerId.parse(relay))
        raise InvalidAddress(f"{shown!r}: after the port comes nothing or /p2p/ID, as in {_EXAMPLE}")

    def with_peer(self, peer_id: PeerId) -> Multiaddr:
        """The same place, naming who is expected there."""
        return replace(self, peer_id=peer_id)

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The IP address in it; None where a name must be resolved first."""
        return ipaddress.ip_address(self.host) if self.protocol in ("ip4", "ip6") else None

    def __str__(self) -> str:
        text = f"/{self.protocol}/{self.host}/tcp/{self.port}"
        if self.relay is not None:
            text += f"/p2p/{self.relay}/p2p-circuit"
        if self.peer_id is not None:
            text += f"/p2p/{self.peer_id}"
        return text
