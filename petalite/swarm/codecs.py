"""How hidden states travel: the table of wire codecs, each a name and a pair of pure functions.

A codec turns hidden states (T, E) into bytes and back, token by token: every token takes the same number of
bytes, and what is one after another may be cut and joined between tokens. So a reader knows the length
before it takes memory, and what was encoded is what a sender keeps for replay. Encoding makes the one copy
of a send; decoding a raw codec makes none. `compress` and `decompress` go around a whole message.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import zstandard

from petalite.errors import BadTensor, InvalidArgument
from petalite.kernels import dynamic8
from petalite.model.compute import FEW_BYTES, WIDE_FLOATS, is_finite, plainly_finite
from petalite.net.messages import Buffer

assert sys.byteorder == "little", "the wire is little-endian and tensors are sent from memory"

PACKED = "+zstd"
_ASIDE_BYTES = 1 << 16  # packed in some 0.1 ms
_ZSTD_LEVEL = 1
_ZSTD_WINDOW_BYTES = 1 << 27  # what a frame may ask a reader to keep; zstd's own default for strangers


@dataclass(frozen=True, slots=True)
class Codec:
    """`raw` in one of the float dtypes. The name is what travels."""

    name: str
    dtype: torch.dtype  # that decoding gives
    is_packed: bool = False  # by zstd, one message at a time
    plain: str = field(init=False)  # the codec of its bytes where they are not packed

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", self.name.removesuffix(PACKED))

    def nbytes(self, n_tokens: int, hidden_size: int) -> int:
        return n_tokens * hidden_size * self.dtype.itemsize

    def encode(self, hidden: torch.Tensor) -> bytearray:
        """hidden (T, E), any float dtype and device -> the wire's bytes."""
        if self._n_planes > 1 and hidden.is_cpu:
            # In no tensor operation, or one: between two passes over a model's weights each costs tens of
            # microseconds.
            if hidden.dtype is not self.dtype and hidden.nbytes <= FEW_BYTES:
                hidden = hidden.to(self.dtype)
            if hidden.dtype is self.dtype and hidden.is_contiguous():
                return bytearray((ctypes.c_char * hidden.nbytes).from_address(hidden.data_ptr()))
        out = bytearray(self.nbytes(*hidden.shape))
        if out:
            self.encode_into(hidden, memoryview(out))
        return out

    def encode_into(self, hidden: torch.Tensor, out: memoryview) -> None:
        """The same into memory of `nbytes(T, E)` bytes."""
        torch.frombuffer(out, dtype=self.dtype).view(hidden.shape).copy_(hidden)

    def decode(self, data: Buffer, hidden_size: int) -> torch.Tensor:
        """The wire's bytes -> (T, E) in `dtype`; raw ones share their memory. T is what the length says."""
        self._n_tokens(data, hidden_size)
        return torch.frombuffer(data, dtype=self.dtype).view(-1, hidden_size)

    def is_finite(self, data: memoryview, hidden_size: int) -> bool:
        """Whether decoding gives neither NaN nor Inf."""
        few = self._n_planes > 1 and self.dtype in WIDE_FLOATS and len(data) <= FEW_BYTES
        return (few and plainly_finite(bytes(data), self.dtype.itemsize)) or is_finite(
            self.decode(data, hidden_size)
        )

    def pack(self, data: Buffer) -> Buffer:
        """What was encoded, as it travels."""
        return _compress(data, self._n_planes) if self.is_packed else data

    def unpack(self, data: Buffer, nbytes: int) -> Buffer:
        """What was encoded, of what travelled. `nbytes` is what the message's header makes it, and no more
        memory is taken than that; raises BadTensor where something else is packed there. What is not packed
        is returned as it is, for its reader to measure.
        """
        return _decompress(data, nbytes, self._n_planes) if self.is_packed else data

    @property
    def _n_planes(self) -> int:
        """Bytes of a value, which stand apart when packed: exponents of floats are alike, and compress well
        where they stand together.
        """
        return self.dtype.itemsize

    def _n_tokens(self, data: Buffer, hidden_size: int) -> int:
        row_bytes = self.nbytes(1, hidden_size)
        if len(data) == 0 or len(data) % row_bytes:
            raise BadTensor(
                f"found {len(data)} bytes of hidden states, expected a multiple of {row_bytes} "
                f"(hidden size {hidden_size}, {self.name})"
            )
        return len(data) // row_bytes


class Landing:
    """Memory into which one token's raw states are copied, again and again, without a tensor operation."""

    def __init__(self, codec: Codec, hidden_size: int) -> None:
        self.codec = codec
        self.hidden = torch.empty(1, hidden_size, dtype=codec.dtype)
        chars = ctypes.c_char * self.hidden.nbytes
        self._bytes = memoryview(chars.from_address(self.hidden.data_ptr())).cast("B")

    def put(self, data: Buffer) -> torch.Tensor:
        """(1, E), until the next one is put here."""
        if len(data) != len(self._bytes):
            raise BadTensor(f"found {len(data)} bytes of one token's states, expected {len(self._bytes)}")
        self._bytes[:] = data
        return self.hidden


class Dynamic8Codec(Codec):
    """`q8`: a token's codes, a byte each, then its scales, a float16 for every 64 values. See
    docs/protocol.md.
    """

    __slots__ = ()

    @property
    def _n_planes(self) -> int:
        return 1

    def nbytes(self, n_tokens: int, hidden_size: int) -> int:
        return n_tokens * (hidden_size + 2 * dynamic8.n_blocks(hidden_size))

    def encode_into(self, hidden: torch.Tensor, out: memoryview) -> None:
        n_tokens, width = hidden.shape
        rows = torch.frombuffer(out, dtype=torch.uint8).view(n_tokens, -1)
        scales = torch.empty(n_tokens, dynamic8.n_blocks(width), dtype=torch.float16)
        if hidden.device.type == "cpu":
            dynamic8.encode(hidden, rows[:, :width], scales)
        else:  # computed there, so that a quarter of the bytes crosses over
            codes, there = hidden.new_empty(hidden.shape, dtype=torch.uint8), scales.to(hidden.device)
            dynamic8.encode(hidden, codes, there)
            rows[:, :width] = codes.cpu()
            scales = there.cpu()
        rows[:, width:] = scales.view(torch.uint8)

    def decode(self, data: Buffer, hidden_size: int) -> torch.Tensor:
        n_tokens = self._n_tokens(data, hidden_size)
        rows = torch.frombuffer(data, dtype=torch.uint8).view(n_tokens, -1)
        scales = torch.empty(n_tokens, dynamic8.n_blocks(hidden_size), dtype=torch.float16)
        scales.view(torch.uint8).copy_(rows[:, hidden_size:])  # aligned, wherever they lay
        out = torch.empty(n_tokens, hidden_size, dtype=self.dtype)
        dynamic8.decode(rows[:, :hidden_size], scales, out)
        return out


_RAW = (Codec("f32", torch.float32), Codec("bf16", torch.bfloat16), Codec("f16", torch.float16))
Q8 = Dynamic8Codec("q8", torch.float32)
RAW = frozenset(codec.name for codec in _RAW)
CODECS: Mapping[str, Codec] = {codec.name: codec for codec in (*_RAW, Q8)}
_PACKED = tuple(replace(codec, name=codec.name + PACKED, is_packed=True) for codec in CODECS.values())
SESSION_CODECS: Mapping[str, Codec] = {**CODECS, **{codec.name: codec for codec in _PACKED}}


def codec_named(name: str, known: Mapping[str, Codec] = CODECS) -> Codec:
    """From a peer's or a user's word for it. Raises BadTensor, listing the known ones."""
    codec = known.get(name)
    if codec is None:
        raise BadTensor(f"unknown codec {name[:20]!r}; known are {', '.join(known)}")
    return codec


def session_codec(name: str) -> Codec:
    """Likewise, of a session's steps, which may be packed: what unpacks there is bounded by a step's."""
    return codec_named(name, SESSION_CODECS)


def raw_codec(dtype: torch.dtype) -> Codec:
    """The codec that loses nothing of `dtype`."""
    for codec in _RAW:
        if codec.dtype == dtype:
            return codec
    known = ", ".join(codec.name for codec in _RAW)
    raise InvalidArgument(f"hidden states of {dtype} have no wire codec; known are {known}")


async def pack(codec: Codec, data: Buffer) -> Buffer:
    """`codec.pack`, beside the event loop where it takes long."""
    if codec.is_packed and len(data) > _ASIDE_BYTES:
        return await asyncio.to_thread(codec.pack, data)
    return codec.pack(data)


async def unpack(codec: Codec, data: Buffer, nbytes: int) -> Buffer:
    """`codec.unpack`, likewise."""
    if codec.is_packed and nbytes > _ASIDE_BYTES:
        return await asyncio.to_thread(codec.unpack, data, nbytes)
    return codec.unpack(data, nbytes)


def _compress(data: Buffer, n_planes: int) -> bytes:
    """A zstd frame of the first bytes of all values, then the second ones, and so on."""
    if n_planes > 1:
        whole = bytes(
            data
        )  # whose slices are copied by C; a view's are not, and torch takes five times as long
        data = b"".join(whole[plane::n_planes] for plane in range(n_planes))
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)


def _decompress(frame: Buffer, nbytes: int, n_planes: int) -> Buffer:
    try:
        said = zstandard.frame_content_size(frame)
        if said != nbytes or nbytes % n_planes:
            raise BadTensor(f"a compressed tensor says it holds {said} bytes, expected {nbytes}")
        reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        data = reader.decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadTensor(f"a compressed tensor cannot be read: {error}") from error
    if len(data) != nbytes:
        raise BadTensor(f"a compressed tensor holds {len(data)} bytes, expected {nbytes}")
    values, size = bytearray(nbytes), nbytes // n_planes
    for plane in range(n_planes):
        values[plane::n_planes] = data[plane * size : (plane + 1) * size]
    return values
