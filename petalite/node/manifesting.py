"""`manifest`: write down what every tensor of a model folder is."""

from __future__ import annotations

from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint
from petalite.model.hashing import write_manifest
from petalite.model.manifest import Manifest
from petalite.node.console import out, progress


def run(model: str) -> None:
    checkpoint = Checkpoint.open(model)
    if checkpoint.quantized is not None:
        raise InvalidArgument(
            f"{model} holds quantized blocks, whose version is that of what they were made from; make the "
            f"manifest there, and quantize again"
        )
    with progress("reading tensors") as report:
        manifest = write_manifest(checkpoint, report)
    out.print(f"{checkpoint.folder / Manifest.FILE}: {len(manifest.tensors)} tensors, {manifest.digest}")
    out.print(f"  model  {Checkpoint.open(model).model_id()}")
