"""The ends of a model that a client keeps: token ids to hidden states, and hidden states to logits.

The embedding is never copied: its rows are looked up in the mapped file. Where it serves as the head too,
the head has its own copy in the layout that its kernel reads fastest. Knows tensors; knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.kernels import linear
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.quantized import FORMATS, NONE, QuantizedWeight
from petalite.kernels.wide import WideLinear
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import is_finite
from petalite.model.config import ModelConfig

Norm = tuple[Tensor, Tensor | None]  # weight (E,), and bias (E,) where it is a LayerNorm


class Edges:
    """Embedding (and its norm, where the model has one), final norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        norm: Norm,
        head: linear.Linear,  # float32 in, float32 out
        *,
        embedding_norm: Norm | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._embedding_norm = embedding_norm

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory; the embedding stays in its file."""
        norms = (*self._norm, *(self._embedding_norm or ()))
        total: int = sum(part.nbytes for part in norms if part is not None)
        return total + self._head.nbytes

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
        hidden = self._embedding[index].to(self.device, self.dtype)
        return hidden if self._embedding_norm is None else self._normed(hidden, self._embedding_norm)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (T, E) → logits (T, V) in float32, the final norm included."""
        return self._head(self.norm(hidden).float())

    def norm(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, E) after the last block → (…, E) as the head has them."""
        return self._normed(hidden.to(self.device, self.dtype), self._norm)

    def _normed(self, hidden: Tensor, norm: Norm) -> Tensor:
        weight, bias = norm
        if bias is None:
            return rms_norm(hidden, hidden.shape[-1:], weight, self.config.norm_eps)
        return layer_norm(hidden, hidden.shape[-1:], weight, bias, self.config.norm_eps)


def load_edges(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quant: str = NONE,
) -> Edges:
    """Read the embedding, norm and head of a checkpoint, and nothing else of it. `quant` is the format of
    the head.

    Raises InvalidCheckpoint.
    """
    config, names, device = checkpoint.config, checkpoint.family.names, torch.device(device)
    embedding, norm = checkpoint.outer + names.embedding, checkpoint.outer + names.norm
    table, vector = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {embedding: table, norm: vector}
    embedding_norm = None
    if names.embedding_norm is not None:  # a family of LayerNorms, which have biases
        embedding_norm = checkpoint.outer + names.embedding_norm
        shapes |= dict.fromkeys((embedding_norm, _bias(embedding_norm), _bias(norm)), vector)
    head = embedding if config.tied_embeddings or names.head not in checkpoint.shard_of else names.head
    shapes[head] = table
    tensors = checkpoint.read(shapes)
    in_memory = shapes.keys() - ({embedding} - {head})  # the embedding stays in its file, but as a head
    parts = {name: tensors[name].to(device, dtype) for name in in_memory}
    for name, tensor in parts.items():
        if not is_finite(tensor):
            raise InvalidCheckpoint(f"{checkpoint.folder}: there are NaN or Inf in {name!r}")
    weight = parts[head] if quant == NONE else FORMATS[quant].quantize(parts[head])
    return Edges(
        config,
        tensors[embedding],
        (parts[norm], parts.get(_bias(norm))),
        _head(weight, dtype, device, quant),
        embedding_norm=None
        if embedding_norm is None
        else (parts[embedding_norm], parts[_bias(embedding_norm)]),
        dtype=dtype,
        device=device,
    )


def _head(
    weight: Tensor | QuantizedWeight, dtype: torch.dtype, device: torch.device, quant: str
) -> linear.Linear:
    """The head's product. torch's own would round the logits to `dtype`."""
    kernel = linear.pick(device, dtype, quant)
    if isinstance(weight, Tensor) and dtype != torch.float32 and kernel.make is not NativeLinear:
        return WideLinear(weight)
    return kernel.make(weight, None)


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
