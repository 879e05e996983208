"""A folder's manifest: the name, dtype, shape and SHA-256 of every tensor. Its digest is the version of the
weights.

Format of manifest.json: {"version": 1, "tensors": {name: {"dtype": "F32", "shape": [...], "sha256": hex}}};
the digest is over the canonical JSON of `tensors`, so it does not depend on how they are spread over files.
Knows names and digests only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from petalite.errors import InvalidCheckpoint

_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """`tensors` maps each name to its dtype (as safetensors spells it), shape and SHA-256 of its bytes."""

    FILE: ClassVar[str] = "manifest.json"

    tensors: Mapping[str, tuple[str, tuple[int, ...], str]]

    @classmethod
    def parse(cls, value: Mapping[str, Any], *, source: str) -> Manifest:
        """From the JSON object. Raises InvalidCheckpoint."""
        entries = value.get("tensors")
        if value.get("version") != _VERSION or not isinstance(entries, dict):
            raise InvalidCheckpoint(f"{source} is no manifest of version {_VERSION}")
        tensors = {}
        for name, entry in entries.items():
            match entry:
                case {"dtype": str(dtype), "shape": list(shape), "sha256": str(digest)}:
                    if _SHA256.fullmatch(digest) and all(type(size) is int for size in shape):
                        tensors[name] = (dtype, tuple(shape), digest)
                        continue
            raise InvalidCheckpoint(
                f"{source}: the entry of tensor {name!r} needs a dtype, a shape and a sha256"
            )
        return cls(tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of the tensors, in hex."""
        return hashlib.sha256(
            json.dumps(self._json(), sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

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
        return json.dumps({"version": _VERSION, "tensors": self._json()}, sort_keys=True, indent=1)

    def _json(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"dtype": dtype, "shape": list(shape), "sha256": digest}
            for name, (dtype, shape, digest) in self.tensors.items()
        }
