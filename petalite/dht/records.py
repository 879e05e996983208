"""Signed records: what peers publish, and when one may be believed.

A record belongs to its owner alone: many owners write under one name, each only under its own peer id, and
the signature covers everything. On the wire it is one byte string, laid out below, whose bytes are what was
signed:

    u8 version | u8 n, namespace | u16 n, name |
    owner 32 | u64 sequence | u64 issued_at | u32 ttl_s | u16 n, value | signature 64

big-endian. An empty value is a tombstone: the owner has left. Of two records with one owner the newer stands,
by `Record.rank`. A life counts on the holder's own clock from receipt; `issued_at` is the owner's clock, and
only bounds for how long a record can be replayed, so it may be off by `CLOCK_TOLERANCE_S`.

Knows bytes and rules; knows no peer's address and reads no clock.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from petalite.dht.keys import DhtKey
from petalite.errors import BadRecord, ForgedRecord, InvalidArgument
from petalite.net.identity import Identity, PeerId

MAX_VALUE_BYTES = 4096
MAX_NAME_BYTES = 512
MAX_NAMESPACE_BYTES = 64
MAX_TTL_S = 24 * 3600
# Both clocks may be ten minutes off, in opposite directions, and a minute goes by on the way.
CLOCK_TOLERANCE_S = 2 * 600 + 60

_VERSION = 1
_DOMAIN = b"petalite-dht-record-v1"
_MIDDLE = struct.Struct(">32sQQIH")
_SIGNATURE_BYTES = 64
MAX_RECORD_BYTES = (
    2 + MAX_NAMESPACE_BYTES + 2 + MAX_NAME_BYTES + _MIDDLE.size + MAX_VALUE_BYTES + _SIGNATURE_BYTES
)

Validate = Callable[[PeerId, bytes, bytes], None]
"""`validate(owner, name, value)` raises BadRecord where the value breaks the namespace's schema."""
NamespaceRules = Mapping[str, Validate]
"""Which namespaces there are; records of any other are refused."""


@dataclass(frozen=True, slots=True)
class Record:
    """What `owner` says under `(namespace, name)`."""

    namespace: str
    name: bytes
    owner: PeerId
    value: bytes  # at most MAX_VALUE_BYTES; empty: a tombstone
    sequence: int  # the higher one stands
    issued_at: int  # unix seconds, by the owner's clock
    ttl_s: int  # life, from receipt on the holder's clock
    signature: bytes = b""
    key: DhtKey = field(init=False, compare=False, repr=False)  # where it lives

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", DhtKey.of(self.namespace, self.name))

    @classmethod
    def sign(
        cls,
        identity: Identity,
        namespace: str,
        name: bytes | str,
        value: bytes,
        *,
        sequence: int,
        issued_at: int,
        ttl_s: int,
    ) -> Record:
        """A record of our own. Raises InvalidArgument for what every peer would refuse."""
        name = name.encode() if isinstance(name, str) else name
        if not 0 < len(namespace.encode()) <= MAX_NAMESPACE_BYTES or len(name) > MAX_NAME_BYTES:
            raise InvalidArgument(
                f"a record's namespace has 1 to {MAX_NAMESPACE_BYTES} bytes and its name at most "
                f"{MAX_NAME_BYTES}; found {len(namespace.encode())} and {len(name)}"
            )
        if len(value) > MAX_VALUE_BYTES:
            raise InvalidArgument(
                f"a record's value has at most {MAX_VALUE_BYTES} bytes, found {len(value)}; "
                "publish a reference to it instead"
            )
        if not 0 < ttl_s <= MAX_TTL_S:
            raise InvalidArgument(f"a record lives 1 to {MAX_TTL_S} seconds, found ttl_s={ttl_s}")
        record = cls(namespace, name, identity.peer_id, bytes(value), sequence, issued_at, ttl_s)
        return replace(record, signature=identity.sign(_DOMAIN + record._signed_part()))

    @property
    def is_tombstone(self) -> bool:
        return not self.value

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """The higher of two records of one owner and name stands, at every peer alike."""
        return self.sequence, self.issued_at, self.signature

    def verify(self) -> bool:
        """Whether the owner signed it. Costs ~0.1 ms: make the cheap checks first."""
        return self.owner.verify(self.signature, _DOMAIN + self._signed_part())

    def _signed_part(self) -> bytes:
        namespace = self.namespace.encode()
        return b"".join(
            (
                bytes((_VERSION, len(namespace))),
                namespace,
                len(self.name).to_bytes(2),
                self.name,
                _MIDDLE.pack(
                    self.owner.public_key, self.sequence, self.issued_at, self.ttl_s, len(self.value)
                ),
                self.value,
            )
        )

    def encode(self) -> bytes:
        return self._signed_part() + self.signature

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Raises BadRecord unless the bytes are exactly one record; checks no signature."""
        if len(data) > MAX_RECORD_BYTES:
            raise BadRecord(f"a record has at most {MAX_RECORD_BYTES} bytes, found {len(data)}")
        try:
            version, n_namespace = data[0], data[1]
            at = 2 + n_namespace
            namespace = data[2:at].decode()
            n_name = int.from_bytes(data[at : at + 2])
            name = data[at + 2 : at + 2 + n_name]
            at += 2 + n_name
            owner, sequence, issued_at, ttl_s, n_value = _MIDDLE.unpack_from(data, at)
        except (IndexError, UnicodeDecodeError, struct.error):
            raise BadRecord(f"{len(data)} bytes that are not a record") from None
        at += _MIDDLE.size
        if version != _VERSION:
            raise BadRecord(f"a record of version {version}; this peer knows version {_VERSION}")
        if not namespace or n_namespace > MAX_NAMESPACE_BYTES or n_name > MAX_NAME_BYTES:
            raise BadRecord(f"a record with a namespace of {n_namespace} and a name of {n_name} bytes")
        if n_value > MAX_VALUE_BYTES or len(data) != at + n_value + _SIGNATURE_BYTES:
            raise BadRecord(f"a record of {len(data)} bytes that claims a value of {n_value}")
        value = data[at : at + n_value]
        return cls(namespace, name, PeerId(owner), value, sequence, issued_at, ttl_s, data[at + n_value :])


class RecordChecker:
    """Decides whether a record may be believed; remembers which bytes it has found good, so that the same
    record from twenty holders costs one signature check. Meant to be shared by the nodes of a process."""

    def __init__(self, rules: NamespaceRules, *, remembered: int = 1024) -> None:
        self.rules = rules
        self._remembered = remembered
        self._good: dict[bytes, Record] = {}  # encoded -> decoded; the longest known first

    def check(self, data: bytes, unix_s: float, *, from_owner: bool = False) -> Record:
        """The record in `data`. Raises BadRecord, naming what is wrong: bytes, life, clock, namespace,
        schema; and ForgedRecord for a wrong signature. `from_owner`: it comes from its owner now, so it was
        signed just now."""
        known = self._good.get(data)
        record = known or Record.decode(data)
        self._check_time(record, unix_s, 0 if from_owner else record.ttl_s)
        if known is None:
            self._check_content(record)
            self._good[data] = record
            if len(self._good) > self._remembered:
                del self._good[next(iter(self._good))]
        return record

    @staticmethod
    def _check_time(record: Record, unix_s: float, age_limit_s: int) -> None:
        if not 0 < record.ttl_s <= MAX_TTL_S:
            raise BadRecord(f"a record that wants to live {record.ttl_s} s; allowed are 1 to {MAX_TTL_S}")
        age_s = unix_s - record.issued_at
        if age_s < -CLOCK_TOLERANCE_S:
            raise BadRecord(f"a record issued {-age_s:.0f} s in the future; check both clocks")
        if age_s > age_limit_s + CLOCK_TOLERANCE_S:
            raise BadRecord(f"a record issued {age_s:.0f} s ago, too old to be believed; check both clocks")

    def _check_content(self, record: Record) -> None:
        validate = self.rules.get(record.namespace)
        if validate is None:
            known = ", ".join(sorted(self.rules)) or "none"
            raise BadRecord(f"namespace {record.namespace!r} is unknown; known: {known}")
        if not record.is_tombstone:
            try:
                validate(record.owner, record.name, record.value)
            except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
                # A schema that hostile bytes take by surprise refuses them; it must not end the read they
                # came in.
                raise BadRecord(f"a {record.namespace!r} record that breaks its schema: {error}") from error
        if not record.verify():
            raise ForgedRecord(f"a {record.namespace!r} record that {record.owner} did not sign")
