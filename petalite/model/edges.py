"""The ends of a model that a client keeps: token ids to hidden states, and hidden states to logits.

The embedding is never copied: its rows are looked up in the mapped file. Where it serves as the head too,
the head has its own copy in the layout that its kernel reads fastest. Knows tensors; knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.kernels import linear
from petalite.model.checkpoint import Checkpoint
from petalite.model.config import ModelConfig


class Edges:
    """Embedding, final norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        norm: Tensor,
        head: linear.Linear,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._embedding = embedding
        self._norm = norm
        self._head = head

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory; the embedding stays in its file."""
        return self._norm.nbytes + self._head.nbytes

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Token ids (T,) → hidden states (T, E)."""
        index = torch.as_tensor(ids, dtype=torch.int64)
        if index.ndim != 1 or (
            index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self._embedding)
        ):
            raise InvalidArgument(
                f"token ids must be a list of numbers from 0 to {len(self._embedding) - 1}, "
                f"the model's vocabulary; found {index.flatten()[:8].tolist()}…"
            )
        return self._embedding[index].to(self.device, self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (T, E) → logits (T, V) in float32, the final norm included."""
        hidden = hidden.to(self.device, self.dtype)
        normed = rms_norm(hidden, hidden.shape[-1:], self._norm, self.config.norm_eps)
        return self._head(normed).float()


def load_edges(
    checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Edges:
    """Read the embedding, norm and head of a checkpoint, and nothing else of it. Raises InvalidCheckpoint."""
    config, names, device = checkpoint.config, checkpoint.family.names, torch.device(device)
    table = (config.vocab_size, config.hidden_size)
    shapes = {names.embedding: table, names.norm: (config.hidden_size,)}
    tied = config.tied_embeddings or names.head not in checkpoint.shard_of
    if not tied:
        shapes[names.head] = table
    tensors = checkpoint.read(shapes)
    head = tensors[names.embedding if tied else names.head].to(device, dtype)
    norm = tensors[names.norm].to(device, dtype)
    for name, tensor in ((names.norm, norm), (names.embedding if tied else names.head, head)):
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise InvalidCheckpoint(f"{checkpoint.folder}: there are NaN or Inf in {name!r}")
    return Edges(
        config,
        tensors[names.embedding],
        norm,
        linear.pick(device, dtype).make(head, None),
        dtype=dtype,
        device=device,
    )
