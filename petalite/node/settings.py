"""What the command line's options become: small settings, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petalite.errors import InvalidArgument
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.server.node import Node
from petalite.swarm.peer import PeerSettings, load_swarm_key


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Who this node is and how it takes part."""

    identity: Identity
    peer: PeerSettings

    @classmethod
    def parse(
        cls,
        peers: Sequence[str],
        new_swarm: bool,
        listen: Sequence[str],
        identity: Path | None,
        swarm_key: Path | None,
        lan: bool,
    ) -> NodeSettings:
        """A node that keeps its identity in a file saves its peers beside it, and needs no address after a
        restart. Raises InvalidAddress, InvalidIdentity or InvalidArgument for the first thing that cannot
        work."""
        peers_file = None if identity is None else identity.with_name(f"{identity.name}.peers")
        if peers and new_swarm:
            raise InvalidArgument("--peers joins a swarm and --new-swarm begins another; give one of them")
        if not (peers or new_swarm or lan or (peers_file is not None and peers_file.exists())):
            raise InvalidArgument(
                "say how to take part: --peers ADDRESS joins a swarm, --lan the one on the local network, "
                "--new-swarm begins one"
            )
        settings = PeerSettings(
            listen=tuple(map(Multiaddr.parse, listen)),
            bootstrap=tuple(map(Multiaddr.parse, peers)),
            swarm_key=None if swarm_key is None else load_swarm_key(swarm_key),
            lan=lan,
            peers_file=peers_file,
        )
        return cls(Identity.generate() if identity is None else Identity.load_or_create(identity), settings)

    def node(self) -> Node:
        return Node(
            listen=self.peer.listen,
            peers=self.peer.bootstrap,
            identity=self.identity,
            swarm_key=self.peer.swarm_key,
            lan=self.peer.lan,
            peers_file=self.peer.peers_file,
        )
