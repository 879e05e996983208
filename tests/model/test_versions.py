"""Versions of trained parts: written, read, listed with their lineage, compared; broken ones are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from petalite.errors import InvalidAdapter, InvalidArgument
from petalite.model.versions import (
    CARD,
    MAX_CARD_BYTES,
    Card,
    diff,
    find_version,
    lineage,
    list_versions,
    read_version,
    write_version,
)
from tests.helpers.disk import room_for

TENSORS = {"prompt": torch.arange(6.0).view(2, 3)}
BASE = Card("tiny@0", "prompt", {"n_tokens": 2}, {"loss": 0.5}, note="first")


def child_of(parent: str | None, **more: Any) -> Card:
    return Card("tiny@0", "prompt", {"n_tokens": 2}, parent=parent, **more)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    version = write_version(tmp_path / "new", TENSORS, BASE, {"alpha": "16.0"})
    assert version.digest == hashlib.sha256(version.path.read_bytes()).hexdigest()
    assert version.path.name == f"prompt-{version.short}.safetensors"
    again = read_version(version.path)
    assert again == version and again.card.settings == {"n_tokens": 2} and again.card.created
    assert torch.equal(again.tensors()["prompt"], TENSORS["prompt"])
    assert [path.name for path in version.path.parent.iterdir()] == [version.path.name]


def test_by_digest(tmp_path: Path) -> None:
    version = write_version(tmp_path, TENSORS, BASE)
    other = write_version(tmp_path, {"prompt": torch.ones(2, 3)}, BASE)
    assert find_version(version.digest, tmp_path) == find_version(version.short, tmp_path) == version
    assert find_version(other.path) == other
    for wrong in ("ffff", "", version.digest[:3]):
        with pytest.raises(InvalidArgument, match="begins with"):
            find_version(wrong, tmp_path)


def test_lineage_has_parents_first(tmp_path: Path) -> None:
    first = write_version(tmp_path, TENSORS, BASE)
    second = write_version(tmp_path, TENSORS, child_of(first.digest))
    third = write_version(tmp_path, TENSORS, child_of(second.digest))
    sibling = write_version(tmp_path, TENSORS, child_of(first.digest, note="another try"))
    orphan = write_version(tmp_path, TENSORS, child_of("0" * 64))
    save_file(TENSORS, tmp_path / "other.safetensors")
    versions, broken = list_versions(tmp_path)
    depths = {version.digest: depth for version, depth in lineage(versions)}
    assert [depths[one.digest] for one in (first, second, third, sibling, orphan)] == [0, 1, 2, 1, 0]
    assert [one.digest for one in versions] == list(depths)
    assert versions.index(third) == versions.index(second) + 1
    assert len(broken) == 1 and "other.safetensors has no card" in str(broken[0])


def test_diff_tells_what_changed(tmp_path: Path) -> None:
    first = write_version(tmp_path, TENSORS, BASE)
    second = write_version(
        tmp_path,
        {"prompt": torch.zeros(4, 3)},
        Card("tiny@0", "prompt", {"n_tokens": 4}, {"loss": 0.25}, first.digest, "first", first.card.created),
    )
    assert diff(first, second) == {
        "metrics.loss": (0.5, 0.25),
        "parent": (None, first.digest),
        "settings.n_tokens": (2, 4),
        "tensors.prompt": ([2, 3], [4, 3]),
    }
    assert diff(first, first) == {}


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ("{", "broken card"),
        ("[]", "no map"),
        (json.dumps({"model": "m"}), "method"),
        (json.dumps({"model": "m", "method": "../x"}), "method"),
        (json.dumps({"model": "", "method": "lora"}), "model"),
        (json.dumps({"model": "m", "method": "lora", "run": "rm"}), "run"),
        (json.dumps({"model": "m", "method": "lora", "parent": "12"}), "parent"),
        (json.dumps({"model": "m", "method": "lora", "metrics": {"loss": "low"}}), "metrics"),
        ('{"model": "m", "method": "lora", "metrics": {"loss": NaN}}', "metrics"),
        (json.dumps({"model": "m", "method": "lora", "settings": {"a": {"b": 1}}}), "settings"),
        (json.dumps({"model": "m", "method": "lora", "note": "x" * 3000}), "note"),
        (json.dumps({"model": "m", "method": "lora", "note": "x" * MAX_CARD_BYTES}), "card of more"),
        ("[" * 50_000, "broken card"),
        ('{"model": "m", "method": "lora", "metrics": {"loss": 1' + "0" * 400 + "}}", "metrics"),
        ('{"model": "m", "method": "lora", "note": "\\ud800"}', "broken card"),
    ],
)
def test_a_card_that_is_broken_is_named(tmp_path: Path, card: str, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(TENSORS, {CARD: card}))
    with pytest.raises(InvalidAdapter, match=says):
        read_version(path)


def test_a_file_that_is_broken_is_named(tmp_path: Path) -> None:
    version = write_version(tmp_path, TENSORS, BASE)
    for data in (version.path.read_bytes()[:-1], b"", b"\xff" * 100):
        version.path.write_bytes(data)
        with pytest.raises(InvalidAdapter, match=version.path.name):
            read_version(version.path)
    with pytest.raises(InvalidAdapter):
        read_version(tmp_path / "nowhere.safetensors")
    with pytest.raises(InvalidArgument, match="no folder"):
        list_versions(tmp_path / "nowhere")


def test_letters_that_are_none_break_no_listing(tmp_path: Path) -> None:
    """A lone surrogate in the header's JSON, which is a card of no encoding."""
    header = b'{"__metadata__":{"petalite":"\\ud800"}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    versions, broken = list_versions(tmp_path)
    assert not versions and "broken card" in str(broken[0])


def test_a_disk_that_is_full_keeps_nothing(tmp_path: Path) -> None:
    first = write_version(tmp_path, TENSORS, BASE)
    with room_for(100), pytest.raises(InvalidArgument, match=r"cannot write .*File too large"):
        write_version(tmp_path, {"prompt": torch.ones(2, 3)}, BASE)
    assert list(tmp_path.iterdir()) == [first.path]
    with pytest.raises(InvalidArgument, match="cannot write"):
        write_version(first.path, TENSORS, BASE)


def test_no_card_is_written_that_no_reader_takes(tmp_path: Path) -> None:
    for card in (
        Card("tiny@0", "prompt", metrics={"loss": float("nan")}),
        Card("tiny@0", "prompt", {"module": torch.nn.ReLU}),
        Card("tiny@0", "a/b"),
    ):
        with pytest.raises(InvalidArgument, match="card"):
            write_version(tmp_path, TENSORS, card)
    assert not list(tmp_path.iterdir())
