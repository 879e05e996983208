"""What servers publish in the DHT, and under which keys.

    servers/{model id}/{segment}   who holds blocks of this segment of 8: one `ServerRecord` per server
    models/catalogue               which models the swarm serves: one `ModelRecord` per server

Values are msgpack of a typed record, checked by every storing peer and every reader (`NAMESPACES`). Loads no
torch: a bootstrap node keeps these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgpack

from petalite.errors import BadMessage, BadRecord, InvalidAddress
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.net.schema import between, decode, encode, length
from petalite.swarm.spans import MAX_BLOCKS, Span

SEGMENT_BLOCKS = 8
SERVERS, MODELS = "servers", "models"
CATALOGUE = "catalogue"
MAX_ADDRESSES = 8
MAX_MODEL_ID = 192  # characters
MAX_LINKS = 16
MAX_ADAPTERS = 8

Block = Annotated[int, between(0, MAX_BLOCKS)]
ShortText = Annotated[str, length(0, 32)]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LinkTo:
    """A server that this one may push to, and how far it is."""

    peer: PeerId
    rtt_ms: Annotated[float, between(0, 1e5)]
    bytes_per_s: Annotated[float, between(0, 1e13)] = 0.0  # each way; 0: not measured


@dataclass(frozen=True, slots=True)
class HostedAdapter:
    """A LoRA that this server's owner lends: sessions and training calls may name its digest."""

    name: Annotated[str, length(1, 64)]
    digest: Annotated[bytes, length(32, 32)]


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One server's offer: a span, where it answers, and what it measured of itself."""

    start: Block
    end: Block
    addresses: Annotated[tuple[Annotated[str, length(1, 512)], ...], length(0, MAX_ADDRESSES)]  # multiaddrs
    dtype: ShortText  # it computes in
    quant: ShortText  # of its weights
    block_ms: Annotated[float, between(0, 1e6)]  # one token through one block
    free_tokens: Annotated[int, between(0, 2**40)]  # cache room over the whole span
    version: ShortText  # of petalite
    tokens_per_s: Annotated[float, between(0, 1e9)] = 0.0  # that it can carry; 0: as block_ms has it
    # One token of many through one block; 0: not measured.
    prefill_ms: Annotated[float, between(0, 1e6)] = 0.0
    waiting_tokens: Annotated[int, between(0, 2**40)] = 0  # of all sessions' steps, when this was written
    links: Annotated[tuple[LinkTo, ...], length(0, MAX_LINKS)] = ()  # to servers of the block after its last
    serving: bool = True  # False: it is loading these blocks, and will serve them
    pinned: bool = False  # its owner chose its blocks; it does not move
    claim_start: Block = 0  # the blocks it is about to move to; 0:0 where it stays
    claim_end: Block = 0
    gives_weights: bool = False  # whoever joins can fetch the model's tensors from it
    sessions: Annotated[int, between(0, 2**20)] = 0  # open when this was written
    kept_mib: Annotated[int, between(0, 2**30)] = 0  # of what they pushed on, to replay it
    adapters: Annotated[tuple[HostedAdapter, ...], length(0, MAX_ADAPTERS)] = ()
    training_tokens: Annotated[int, between(0, 2**40)] = 0  # most that it takes in one call; 0: it takes none

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)

    @property
    def claim(self) -> Span | None:
        return Span(self.claim_start, self.claim_end) if self.claim_end else None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One model somebody serves."""

    model_id: Annotated[str, length(1, MAX_MODEL_ID)]
    n_blocks: Annotated[int, between(1, MAX_BLOCKS)]


def segments(span: Span) -> range:
    """The segments a span touches."""
    return range(span.start // SEGMENT_BLOCKS, (span.end - 1) // SEGMENT_BLOCKS + 1)


def segment_name(model_id: str, segment: int) -> str:
    """The name, within SERVERS, under which a segment's servers stand."""
    return f"{model_id}/{segment}"


def server_names(model_id: str, span: Span) -> Iterator[str]:
    for segment in segments(span):
        yield segment_name(model_id, segment)


def pack(record: ServerRecord | ModelRecord) -> bytes:
    packed: bytes = msgpack.packb(encode(record))
    return packed


def unpack(cls: type[T], value: bytes) -> T:
    """Raises BadRecord for anything that is not exactly a `cls`."""
    try:
        body: Any = msgpack.unpackb(value, max_ext_len=0, strict_map_key=True)
        if not isinstance(body, dict):
            raise BadRecord(f"expected a map, found {type(body).__name__}")
        return decode(cls, body)
    except (BadMessage, ValueError, msgpack.UnpackException) as error:
        raise BadRecord(f"not a {cls.__name__}: {error}") from error


def check_server(owner: PeerId, name: bytes, value: bytes) -> None:
    """The rule of SERVERS: a well-formed record whose span touches the segment it stands under."""
    record = unpack(ServerRecord, value)
    if not record.start < record.end:
        raise BadRecord(f"a server of blocks {record.start}:{record.end} serves nothing")
    if record.claim_end and not record.claim_start < record.claim_end:
        raise BadRecord(f"a server cannot move to blocks {record.claim_start}:{record.claim_end}")
    for text in record.addresses:
        try:
            address = Multiaddr.parse(text)
        except InvalidAddress as error:
            raise BadRecord(str(error)) from error
        if address.peer_id != owner:
            raise BadRecord(f"the address {text} is not its owner's ({owner})")
    _, _, segment = name.rpartition(b"/")
    if not segment.isdigit() or int(segment) not in segments(record.span):
        raise BadRecord(f"a server of blocks {record.span} does not belong to segment {segment[:8]!r}")


def check_model(owner: PeerId, name: bytes, value: bytes) -> None:
    """The rule of MODELS: a well-formed record under the catalogue's name."""
    if name != CATALOGUE.encode():
        raise BadRecord(f"{MODELS} has one name, {CATALOGUE!r}, found {name[:32]!r}")
    unpack(ModelRecord, value)


NAMESPACES = {SERVERS: check_server, MODELS: check_model}
