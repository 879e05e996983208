"""Who serves what, as the DHT tells it. Knows records; judges no server and computes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from petalite.dht.node import DhtNode
from petalite.dht.records import Record
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.swarm import records
from petalite.swarm.records import ModelRecord, ServerRecord
from petalite.swarm.spans import Span


@dataclass(frozen=True, slots=True)
class ServerEntry:
    """One server and the record it signed."""

    peer: PeerId
    record: ServerRecord

    @property
    def addresses(self) -> list[Multiaddr]:
        return [Multiaddr.parse(text) for text in self.record.addresses]


class Directory:
    """The servers of one model, as of the last `refresh`."""

    def __init__(self, dht: DhtNode, model_id: str, span: Span) -> None:
        self.model_id = model_id
        self.span = span
        self.servers: list[ServerEntry] = []
        self._dht = dht
        self._read_at_s = -float("inf")

    @property
    def age_s(self) -> float:
        """Seconds since the last refresh."""
        return time.monotonic() - self._read_at_s

    async def refresh(self, *, timeout_s: float) -> None:
        """Read every segment of the span anew. Raises DeadlineExceeded or Unreachable if nobody answers."""
        keys = [(records.SERVERS, name) for name in records.server_names(self.model_id, self.span)]
        found = await self._dht.find(keys, timeout_s=timeout_s)
        newest = newest_of_each_owner(record for of_key in found.values() for record in of_key)
        self.servers = [
            ServerEntry(record.owner, records.unpack(ServerRecord, record.value)) for record in newest
        ]
        self._read_at_s = time.monotonic()


async def find_models(dht: DhtNode, *, timeout_s: float) -> list[ModelRecord]:
    """Every model that somebody serves, each once, by name."""
    found = await dht.find([(records.MODELS, records.CATALOGUE)], timeout_s=timeout_s)
    models = {records.unpack(ModelRecord, record.value) for of_key in found.values() for record in of_key}
    return sorted(models, key=lambda model: model.model_id)


def newest_of_each_owner(found: Iterable[Record]) -> list[Record]:
    """A server stands under every segment it touches; of what it says there, the newest counts."""
    newest: dict[PeerId, Record] = {}
    for record in found:
        known = newest.get(record.owner)
        if known is None or known.rank < record.rank:
            newest[record.owner] = record
    return list(newest.values())
