"""How hidden states travel: the table of wire codecs, each a name and a pair of pure functions.

A codec turns hidden states (T, E) into bytes and back. The bytes' length follows from the codec, T and E,
so a reader checks it before it takes memory. Encoding makes the one copy of a send; decoding makes none
where the wire's dtype is the wanted one. What was encoded is what a sender keeps for replay.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from petalite.errors import BadTensor, InvalidArgument
from petalite.net.messages import Buffer

assert sys.byteorder == "little", "the wire is little-endian and tensors are sent from memory"


@dataclass(frozen=True, slots=True)
class Codec:
    """`raw` in one of the float dtypes. The name is what travels."""

    name: str
    dtype: torch.dtype

    def nbytes(self, n_tokens: int, hidden_size: int) -> int:
        return n_tokens * hidden_size * self.dtype.itemsize

    def encode(self, hidden: torch.Tensor) -> bytearray:
        """hidden (T, E), any float dtype and device -> the wire's bytes."""
        out = bytearray(hidden.numel() * self.dtype.itemsize)
        if out:
            torch.frombuffer(out, dtype=self.dtype).view(hidden.shape).copy_(hidden)
        return out

    def decode(self, data: Buffer, hidden_size: int) -> torch.Tensor:
        """The wire's bytes -> (T, E) in the wire's dtype, sharing their memory. T is what the length says."""
        row_bytes = self.nbytes(1, hidden_size)
        if len(data) == 0 or len(data) % row_bytes:
            raise BadTensor(
                f"found {len(data)} bytes of hidden states, expected a multiple of {row_bytes} "
                f"(hidden size {hidden_size}, {self.name})"
            )
        return torch.frombuffer(data, dtype=self.dtype).view(-1, hidden_size)


CODECS = {
    codec.name: codec
    for codec in (Codec("f32", torch.float32), Codec("bf16", torch.bfloat16), Codec("f16", torch.float16))
}


def codec_named(name: str) -> Codec:
    """From a peer's or a user's word for it. Raises BadTensor, listing the known ones."""
    codec = CODECS.get(name)
    if codec is None:
        raise BadTensor(f"unknown codec {name[:20]!r}; known are {', '.join(CODECS)}")
    return codec


def raw_codec(dtype: torch.dtype) -> Codec:
    """The codec that loses nothing of `dtype`."""
    for codec in CODECS.values():
        if codec.dtype == dtype:
            return codec
    raise InvalidArgument(f"hidden states of {dtype} have no wire codec; known are {', '.join(CODECS)}")
