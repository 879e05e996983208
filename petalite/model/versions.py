"""Versions of a trained part: a safetensors file with a small card, named by the SHA-256 of its bytes.

The card says what base model it is for, how it was trained, from which version (`parent`) and how good it is,
so that a folder of versions is a history that others can read, compare, load and go on from (arXiv
2209.01188 §4 and 2312.08361 §5 ask for it). A card is a stranger's word: it is bounded and checked, and
nothing in it is executed. Knows files; knows neither modules nor models.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from petalite.errors import InvalidAdapter, InvalidArgument, InvalidCheckpoint
from petalite.model.tensorfile import header_end, mapped_tensors, read_file_header

CARD = "petalite"  # its key in the file's metadata
SUFFIX = ".safetensors"
MAX_CARD_BYTES = 64 << 10
MAX_HEADER_BYTES = 8 << 20
MAX_VERSION_BYTES = 4 << 30
MAX_TEXT = 2000  # characters of one text of a card


@dataclass(frozen=True, slots=True)
class Card:
    """What a version says of itself."""

    model: str  # id of the base model, name@digest
    method: str  # how it was trained, such as "lora"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method: texts, numbers, lists of these
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None  # digest of the version it was trained on from
    note: str = ""
    created: str = ""  # UTC, ISO 8601


@dataclass(frozen=True, slots=True)
class Version:
    """One file."""

    path: Path
    digest: str  # SHA-256 of the file, hex
    card: Card
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors
    nbytes: int

    @property
    def short(self) -> str:
        return self.digest[:12]

    def tensors(self) -> dict[str, Tensor]:
        """Raises InvalidAdapter if the file has changed since it was looked at."""
        try:
            return {name: tensor.clone() for name, tensor in mapped_tensors(self.path, self.shapes)}
        except InvalidCheckpoint as error:
            raise InvalidAdapter(str(error)) from error


def write_version(
    folder: str | Path, tensors: Mapping[str, Tensor], card: Card, more: Mapping[str, str] | None = None
) -> Version:
    """A new file in `folder`, which is made if need be; `more` are further texts of its metadata.

    Raises InvalidArgument for a card that no reader would take, and where the disk does not take the file.
    """
    card = card if card.created else _dated(card)
    metadata = {**(more or {}), CARD: _text_of(card)}
    # Copies: the library refuses tensors that share memory, as those of a module that stands in two places.
    blob = save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, metadata
    )
    digest = hashlib.sha256(blob).hexdigest()
    path = Path(folder) / f"{card.method}-{digest[:12]}{SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as unfinished:
            whole = Path(unfinished) / path.name
            whole.write_bytes(blob)
            whole.replace(path)
    except OSError as error:
        raise InvalidArgument(f"cannot write {path}: {error.strerror or error}") from error
    return read_version(path)


def read_version(path: str | Path) -> Version:
    """Raises InvalidAdapter for what is no version, or a broken one."""
    path = Path(path)
    try:
        nbytes = path.stat().st_size
        if nbytes > MAX_VERSION_BYTES or header_end(path) > MAX_HEADER_BYTES:
            raise InvalidAdapter(f"{path} is larger than a version of a trained part may be")
        infos, metadata = read_file_header(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (InvalidCheckpoint, OSError) as error:
        raise InvalidAdapter(f"cannot read {path}: {error}") from error
    text = metadata.get(CARD)
    if text is None:
        raise InvalidAdapter(f"{path} has no card; versions are written by petalite.tuning.save_version")
    shapes = {name: info.shape for name, info in infos.items()}
    return Version(path, digest, parse_card(text, str(path)), shapes, nbytes)


def list_versions(folder: str | Path) -> tuple[list[Version], list[InvalidAdapter]]:
    """Every version in a folder, parents before children, else the oldest first; and what is wrong with the
    other safetensors files there. Raises InvalidArgument where there is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidArgument(f"{folder} is no folder")
    versions, broken = [], []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            versions.append(read_version(path))
        except InvalidAdapter as error:
            broken.append(error)
    return [version for version, _ in lineage(versions)], broken


def find_version(which: str | Path, folder: str | Path | None = None) -> Version:
    """By path; or, in a folder, by the beginning of its digest. Raises InvalidAdapter, InvalidArgument."""
    # Path's is_file raises for a name that is too long.
    if folder is None or os.path.isfile(which):  # noqa: PTH113
        return read_version(which)
    prefix = str(which).lower()
    found = [version for version in list_versions(folder)[0] if version.digest.startswith(prefix)]
    if len(prefix) < 4 or len(found) != 1:
        raise InvalidArgument(
            f"{len(found)} versions in {folder} have a digest that begins with {prefix!r}; expected one, and "
            f"at least 4 characters"
        )
    return found[0]


def lineage(versions: Sequence[Version]) -> Iterator[tuple[Version, int]]:
    """Each with how many of its ancestors are among them; children come after their parent."""
    known = {version.digest: version for version in versions}
    children: dict[str | None, list[Version]] = {}
    for version in sorted(known.values(), key=lambda one: (one.card.created, one.digest)):
        parent = version.card.parent if version.card.parent in known else None
        children.setdefault(parent, []).append(version)
    # A digest covers its parent's, so nobody can make a circle.
    pending = [(version, 0) for version in reversed(children.get(None, []))]
    while pending:
        version, depth = pending.pop()
        yield version, depth
        pending += [(child, depth + 1) for child in reversed(children.get(version.digest, []))]


def diff(one: Version, other: Version) -> dict[str, tuple[Any, Any]]:
    """What differs in two versions' cards and in the shapes of their tensors: (of the one, of the other)."""
    a, b = _flat(one), _flat(other)
    return {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


def _flat(version: Version) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in asdict(version.card).items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": one for name, one in value.items()}
        else:
            flat[key] = value
    return flat | {f"tensors.{name}": list(shape) for name, shape in version.shapes.items()}


# -- cards as text ---------------------------------------------------------------------------------------


def _dated(card: Card) -> Card:
    values = {one.name: getattr(card, one.name) for one in fields(card)}
    return Card(**values | {"created": datetime.now(UTC).isoformat(timespec="microseconds")})


def _text_of(card: Card) -> str:
    try:
        text = json.dumps(asdict(card), sort_keys=True, allow_nan=False)
        parse_card(text, "the card")
    except (ValueError, TypeError, InvalidAdapter) as error:
        raise InvalidArgument(f"no version can have this card: {error}") from error
    return text


def parse_card(text: str, source: str) -> Card:
    """Raises InvalidAdapter, naming what is wrong."""
    try:
        if len(text.encode()) > MAX_CARD_BYTES:
            raise InvalidAdapter(f"{source} has a card of more than {MAX_CARD_BYTES} bytes")
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # what is no text cannot be shown either
        if not isinstance(found, dict):
            raise ValueError("it is no map")
        unknown = found.keys() - {one.name for one in fields(Card)}
        if unknown:
            raise ValueError(f"it has {', '.join(sorted(unknown))[:200]}, which cards have not")
        card = Card(**found)
        for name in ("model", "method", "note", "created"):
            _check(isinstance(getattr(card, name), str) and len(getattr(card, name)) <= MAX_TEXT, name)
        _check(bool(card.model) and card.method.replace("-", "").isalnum(), "model or method")
        _check(card.parent is None or _is_digest(card.parent), "parent")
        _check(isinstance(card.settings, dict) and all(map(_is_setting, card.settings.values())), "settings")
        _check(isinstance(card.metrics, dict) and all(map(_is_number, card.metrics.values())), "metrics")
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidAdapter(f"{source} has a broken card: {error}") from error
    return card


def _check(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"its {name} is not what a card's is")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # and no NaN


def _is_setting(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= 4096 and all(isinstance(one, str | int | float | bool | None) for one in value)
    return isinstance(value, str | int | float | bool | None)
