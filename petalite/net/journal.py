"""What happened, for operators: counts for /metrics, and lines of JSON for whoever watches.

After qlog (draft-ietf-quic-qlog-main-schema): an event has a time, a name `category:event` and data. Knows no
link and no socket.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from petalite.errors import ErrorCode
from petalite.net.identity import PeerId

_CODES = {code.value: code.name for code in ErrorCode}


class Journal:
    """Counts every event; writes those that are watched."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # (event, the code's name or nothing)
        self._watchers: list[tuple[PeerId | None, Callable[[str], object]]] = []

    def watch(self, write: Callable[[str], object], peer: PeerId | None = None) -> Callable[[], None]:
        """Have a line of JSON written for each event (of that peer); returns what stops it."""
        watcher = (peer, write)
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def note(self, event: str, peer: PeerId | None = None, code: int = 0, **data: Any) -> None:
        """An event. `code` is an ErrorCode's number; 0: nothing failed."""
        name = _CODES.get(code, str(code)) if code else ""
        self.counts[event, name] += 1
        for wanted, write in self._watchers:
            if wanted is None or wanted == peer:
                who = {} if peer is None else {"peer": str(peer)}
                why = {"code": name} if name else {}
                entry = {"time": round(time.time(), 6), "name": event, **who, **why, **data}
                write(json.dumps(entry, default=str))
