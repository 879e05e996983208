"""Peers kept on disk, so that a restart needs no bootstrap address.

One multiaddr with its peer id per line. The file is a hint: what cannot be read or parsed is passed over.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from pathlib import Path

from petalite.dht.contacts import Contact
from petalite.errors import InvalidAddress
from petalite.net.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

MAX_SAVED = 64
_MAX_FILE_BYTES = 64 << 10


def load_peers(path: Path) -> list[Multiaddr]:
    """The addresses in the file; none when there is no file."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode("ascii", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("cannot read the saved peers in %s: %s", path, error.strerror)
        return []
    addresses = []
    for line in text.splitlines()[:MAX_SAVED]:
        try:
            addresses.append(Multiaddr.parse(line.strip()))
        except InvalidAddress:
            logger.warning("passing over %r in %s: not an address", line[:80], path)
    return addresses


def save_peers(path: Path, contacts: Iterable[Contact]) -> None:
    """Write the first address of each, whole or not at all."""
    lines: list[str] = []
    for contact in contacts:
        if contact.addresses and len(lines) < MAX_SAVED:
            lines.append(str(Multiaddr.parse(contact.addresses[0]).with_peer(contact.peer_id)))
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text("".join(line + "\n" for line in lines))
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot save peers to %s: %s", path, error.strerror)
