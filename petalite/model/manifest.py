"""A folder's manifest: the name, dtype, shape and SHA-256 of every tensor, and the size and SHA-256 of the
files beside them. Its digest is the version of all that.

Format of manifest.json: {"version": 1, "tensors": {name: {"dtype": "F32", "shape": [...], "sha256": hex}},
"files": {name: {"size": bytes, "sha256": hex}}}. The digest is over the canonical JSON of {"files",
"tensors"}, or of `tensors` where no files are named, so it does not depend on how tensors are spread over
files. Knows names and digests only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from petalite.errors import InvalidCheckpoint

_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """`tensors` maps each name to its dtype (as safetensors spells it), shape and SHA-256 of its bytes;
    `files` maps the names of those in OTHER_FILES that there are to their size and SHA-256.
    """

    FILE: ClassVar[str] = "manifest.json"
    OTHER_FILES: ClassVar[tuple[str, ...]] = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    MOST_FILE_BYTES: ClassVar[int] = 64 << 20

    tensors: Mapping[str, tuple[str, tuple[int, ...], str]]
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Mapping[str, Any], *, source: str) -> Manifest:
        """From the JSON object. Raises InvalidCheckpoint."""
        entries, others = value.get("tensors"), value.get("files", {})
        if value.get("version") != _VERSION or not isinstance(entries, dict) or not isinstance(others, dict):
            raise InvalidCheckpoint(f"{source} is no manifest of version {_VERSION}")
        tensors = {}
        for name, entry in entries.items():
            match entry:
                case {"dtype": str(dtype), "shape": list(shape), "sha256": str(digest)}:
                    if _SHA256.fullmatch(digest) and all(type(n) is int and n >= 0 for n in shape):
                        tensors[name] = (dtype, tuple(shape), digest)
                        continue
            raise InvalidCheckpoint(
                f"{source}: the entry of tensor {name!r} needs a dtype, a shape and a sha256"
            )
        files = {}
        for name, entry in others.items():
            match entry:
                case {"size": int(size), "sha256": str(digest)} if name in cls.OTHER_FILES:
                    if _SHA256.fullmatch(digest) and 0 <= size <= cls.MOST_FILE_BYTES:
                        files[name] = (size, digest)
                        continue
            raise InvalidCheckpoint(
                f"{source}: file {name!r} needs a sha256 and a size up to {cls.MOST_FILE_BYTES}, and to be "
                f"one of {', '.join(cls.OTHER_FILES)}"
            )
        return cls(tensors, files)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON, in hex."""
        value = self._json() if self.files else self._json()["tensors"]
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def check(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Whether the file beside the manifest holds what it says. Raises InvalidCheckpoint."""
        expected = self.tensors.get(name)
        if expected is None or expected[:2] != (dtype, shape):
            raise InvalidCheckpoint(
                f"{self.FILE} does not describe these weights: tensor {name!r} is {dtype}{list(shape)}, "
                f"expected {expected and expected[0] + str(list(expected[1]))}; make it anew or remove it"
            )

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"version": _VERSION} | self._json(), sort_keys=True, indent=1)

    def _json(self) -> dict[str, dict[str, Any]]:
        tensors = {
            name: {"dtype": dtype, "shape": list(shape), "sha256": digest}
            for name, (dtype, shape, digest) in self.tensors.items()
        }
        files = {name: {"size": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        return {"tensors": tensors} | ({"files": files} if files else {})
