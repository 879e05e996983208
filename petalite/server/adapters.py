"""The LoRAs that a server holds: those its owner lends for as long as it runs, and those that clients sent.

What clients sent is kept within a number of bytes. Of whoever takes most of them the longest unused goes
first, so that nobody drives out others'; what a session or a call is using stays. An adapter is named by
its digest alone, so nobody can change another's, and the same one sent twice is held once. Knows adapters
and blocks; knows no socket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from petalite.errors import BadAdapter, Busy, InvalidArgument, UnknownAdapter
from petalite.model.block import Block
from petalite.model.checkpoint import Checkpoint
from petalite.model.loading import block_kind
from petalite.model.lora import Adapter, read_peft
from petalite.model.span import BlockSpan
from petalite.swarm.records import MAX_ADAPTERS

COPIES = 2  # of an adapter's bytes: as it came, and stacked for the blocks


def read_lent(folders: Sequence[Path], checkpoint: Checkpoint) -> dict[str, Adapter]:
    """PEFT folders by their names. Raises InvalidAdapter, InvalidArgument for what cannot be announced."""
    names = [folder.resolve().name[:64] for folder in folders]
    if len(set(names)) < len(names) or len(names) > MAX_ADAPTERS:
        raise InvalidArgument(
            f"adapters {', '.join(names)}: a server lends {MAX_ADAPTERS} at most, in folders of different "
            f"names"
        )
    kind, family = block_kind(checkpoint), checkpoint.family.names
    return {
        name: read_peft(folder, checkpoint.config, kind, family)
        for name, folder in zip(names, folders, strict=True)
    }


class HeldAdapter:
    """One adapter, and the blocks that compute with it."""

    def __init__(self, adapter: Adapter, sender: Hashable = None) -> None:
        self.adapter = adapter
        self.sender = sender
        self.users = 0
        self._span: BlockSpan | None = None
        self._blocks: Sequence[Block] = ()

    @property
    def digest(self) -> bytes:
        return self.adapter.digest

    @property
    def nbytes(self) -> int:
        """At most."""
        return COPIES * self.adapter.nbytes

    def blocks_of(self, span: BlockSpan) -> Sequence[Block]:
        """All blocks of the span with the adapter, made once. On the compute thread."""
        if self._span is not span:
            self._span, self._blocks = span, span.adapted_blocks(self.adapter)
        return self._blocks

    def let_go(self) -> None:
        """Of the blocks, before they are unloaded."""
        self._span, self._blocks = None, ()


class Adapters:
    """All that one server holds."""

    def __init__(self, limit_bytes: int, lent: Mapping[str, Adapter] | None = None) -> None:
        """`limit_bytes` for those of clients. `lent` are the owner's, by name."""
        self.limit_bytes = limit_bytes
        self.lent = {name: adapter.digest for name, adapter in (lent or {}).items()}
        self._lent = {adapter.digest: HeldAdapter(adapter) for adapter in (lent or {}).values()}
        self._sent: dict[bytes, HeldAdapter] = {}  # the longest unused first

    @property
    def sent_bytes(self) -> int:
        """What clients' adapters take."""
        return sum(held.nbytes for held in self._sent.values())

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._lent or digest in self._sent

    def check_size(self, nbytes: int) -> None:
        """Raises BadAdapter for a file that could never be held."""
        if COPIES * nbytes > self.limit_bytes:
            raise BadAdapter(
                f"the adapter has {nbytes} bytes, this server takes {self.limit_bytes // COPIES} at most; "
                f"send the tensors of fewer blocks, or of a lower rank"
            )

    def put(self, adapter: Adapter, sender: Hashable = None) -> None:
        """Hold it; others go for it. Raises BadAdapter where it is too large, Busy where all are in use."""
        if adapter.digest in self:
            return
        held = HeldAdapter(adapter, sender)
        self.check_size(adapter.nbytes)
        while self.sent_bytes + held.nbytes > self.limit_bytes:
            del self._sent[self._next_to_go()]
        self._sent[adapter.digest] = held

    def _next_to_go(self) -> bytes:
        taken: Counter[Hashable] = Counter()
        for held in self._sent.values():
            taken[held.sender] += held.nbytes
        unused = [digest for digest, held in self._sent.items() if not held.users]
        if not unused:
            raise Busy("all adapters that this server holds are in use; try again later", retry_after_s=5.0)
        return max(unused, key=lambda digest: taken[self._sent[digest].sender])  # of equals, the first

    @contextmanager
    def use(self, digest: bytes | None) -> Iterator[HeldAdapter | None]:
        """The adapter, which stays as long as this is open. Raises UnknownAdapter."""
        if digest is None:
            yield None
            return
        held = self._lent.get(digest) or self._sent.pop(digest, None)
        if held is None:
            raise UnknownAdapter(f"this server holds no adapter {digest.hex()[:16]}…; send it first")
        if digest not in self._lent:
            self._sent[digest] = held  # the last to go
        held.users += 1
        try:
            yield held
        finally:
            held.users -= 1

    def let_go(self) -> None:
        """Of all blocks, before they are unloaded."""
        for held in (*self._lent.values(), *self._sent.values()):
            held.let_go()
