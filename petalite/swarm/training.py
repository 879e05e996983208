"""What clients and servers say to each other about training: three stateless calls, and how tensors go with
them.

`train.forward` runs whole sequences through blocks; `train.backward` walks back through them, from the same
inputs and the gradient of their outputs; `train.adapter` hands over a LoRA, which later calls name by its
digest. All of a call's rows are texts of `tokens` tokens from their beginning. Nothing on the server changes:
what is trained, and its optimizer, is the client's.

A server works from the inputs alone, so that any other can do the same call. It may hold on to what backward
needs of a forward for a while, when asked (`keep`), and then names it (`TrainDone.kept`); a backward that
names it in turn carries no inputs. Whoever held it may have let go of it by then (`NotKept`): the client
repeats the call with the inputs. Knows messages and tensors; knows no socket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeAlias

import torch
from torch import Tensor

from petalite.errors import BadMessage, BadTensor
from petalite.net.messages import Buffer
from petalite.net.schema import between, length
from petalite.swarm.codecs import CODECS, Codec, codec_named
from petalite.swarm.messages import Block, Count, Digest, HopReport, Milliseconds, Text, Token
from petalite.swarm.spans import Span

FORWARD_METHOD = "train.forward"
BACKWARD_METHOD = "train.backward"
ADAPTER_METHOD = "train.adapter"
ADAPTER_PIECE_BYTES = 1 << 17
ADAPTER_PIECE_S = 10.0  # for each piece to leave, and to come

MAX_CALL_TOKENS = 1 << 16  # rows · tokens of one call; a server's own limit is what its record announces
MAX_PROMPT_TOKENS = 256  # of deep prompts in a block
MAX_ADAPTER_BYTES = 256 << 20  # of one LoRA on the wire; a server's own limit may be lower

# The gradients that a backward call can ask for.
HIDDEN, PROMPTS, ADAPTER = GRADIENTS = ("hidden", "prompts", "adapter")

F32 = CODECS["f32"]  # what prompts, and gradients of prompts and adapters, travel in

CallTokens = Annotated[int, between(1, MAX_CALL_TOKENS)]


@dataclass(frozen=True, slots=True)
class TrainCall:
    """The body of both calls. Buffers of forward: hidden states, then prompts where there are any; of
    backward: the gradient of the outputs, then those of forward unless `kept` names them.
    """

    model_id: Text
    start: Block
    end: Block
    rows: CallTokens
    tokens: CallTokens  # of each row
    codec: Text  # of hidden states and their gradients, in both directions
    # P: what enters a block has so many added to.
    prompt_tokens: Annotated[int, between(0, MAX_CALL_TOKENS)] = 0
    adapter: Digest | None = None
    keep: bool = False  # forward: hold on to what backward needs, if there is room
    kept: Token | None = None  # backward: what forward held on to
    wants: Annotated[tuple[Text, ...], length(0, len(GRADIENTS))] = ()  # backward: of GRADIENTS


@dataclass(frozen=True, slots=True)
class TrainDone:
    """The answer. Buffers of forward: hidden states; of backward: the gradients wanted, in the order of
    GRADIENTS. An adapter's gradient is one float32 buffer: of its tensors for the call's blocks in the order
    of their names, as text, one behind the other.
    """

    codec: Text
    queue_ms: Milliseconds
    compute_ms: Milliseconds
    kept: Token | None = None


@dataclass(frozen=True, slots=True)
class PutAdapter:
    """One buffer: a safetensors file as `petalite.model.lora` describes it, whose SHA-256 is the digest; or
    the beginning of one, perhaps empty. The rest then comes in messages of one buffer of
    ADAPTER_PIECE_BYTES, the last of what is left, once the server wants it.
    """

    model_id: Text
    digest: Digest
    more: Count = 0  # bytes that are not in this message


@dataclass(frozen=True, slots=True)
class AdapterHeld:
    """The answer to `PutAdapter`; the first of two where the server wants the rest."""

    digest: Digest
    more: Count = 0  # bytes that are wanted


def adapter_digest(blob: Buffer) -> bytes:
    """The name of a LoRA: SHA-256 of the file."""
    return hashlib.sha256(blob).digest()


# -- what both ends compute with -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpanInputs:
    """What a call computes from."""

    hidden: Tensor  # (B, T, E)
    # (blocks, P, E), P at most T: added to the first P tokens of what enters each.
    prompts: Tensor | None = None
    adapter: bytes | None = None  # the digest of a LoRA that the server holds


@dataclass(frozen=True, slots=True)
class SpanOutputs:
    hidden: Tensor  # (B, T, E)
    report: HopReport
    kept: bytes | None = None  # names what the server held on to


@dataclass(frozen=True, slots=True)
class SpanGradients:
    """Those that were wanted."""

    hidden: Tensor | None  # (B, T, E)
    prompts: Tensor | None  # (blocks, P, E) float32
    adapter: Tensor | None  # (values,) float32, in the order that `TrainDone` states
    report: HopReport


class SpanTraining(Protocol):
    """The training calls of one place that holds blocks: a server of the swarm, or this process."""

    async def forward(self, span: Span, inputs: SpanInputs, *, keep: bool = False) -> SpanOutputs:
        """Raises what a call can raise: NetworkError, or a RemoteError such as Busy, BatchTooLarge,
        UnknownAdapter, WrongSpan, WrongModel, NotFinite, BadTensor, ShuttingDown.
        """
        ...

    async def backward(
        self,
        span: Span,
        inputs: SpanInputs,
        gradient: Tensor,
        wants: Sequence[str],
        *,
        kept: bytes | None = None,
    ) -> SpanGradients:
        """From the gradient (B, T, E) of what forward gave. With `kept` the inputs stay at home; then it may
        also raise NotKept.
        """
        ...

    async def put_adapter(self, blob: Buffer) -> None:
        """Hand over a LoRA, to be named by its digest from then on. Raises BadAdapter, WrongModel, Busy."""
        ...


# -- on the wire -----------------------------------------------------------------------------------------

Buffers: TypeAlias = list[Buffer]


def input_buffers(codec: Codec, inputs: SpanInputs) -> Buffers:
    """hidden, and prompts where there are any."""
    buffers: Buffers = [encode_rows(codec, inputs.hidden)]
    if inputs.prompts is not None:
        buffers.append(encode_rows(F32, inputs.prompts))
    return buffers


def read_inputs(call: TrainCall, buffers: Sequence[Buffer], hidden_size: int) -> SpanInputs:
    """What `input_buffers` of the caller gave; raw tensors share its memory. Raises BadMessage, BadTensor."""
    n_expected = 2 if call.prompt_tokens else 1
    if len(buffers) != n_expected:
        raise BadMessage(f"the call carries {len(buffers)} buffers of inputs, expected {n_expected}")
    hidden = decode_rows(codec_named(call.codec), buffers[0], (call.rows, call.tokens, hidden_size))
    if not call.prompt_tokens:
        return SpanInputs(hidden, None, call.adapter)
    shape = (call.end - call.start, call.prompt_tokens, hidden_size)
    return SpanInputs(hidden, decode_rows(F32, buffers[1], shape), call.adapter)


def gradient_buffers(codec: Codec, gradients: SpanGradients) -> Buffers:
    """Those that are there, in the order of GRADIENTS."""
    buffers: Buffers = []
    if gradients.hidden is not None:
        buffers.append(encode_rows(codec, gradients.hidden))
    for exact in (gradients.prompts, gradients.adapter):
        if exact is not None:
            buffers.append(F32.encode(exact.reshape(1, -1)))
    return buffers


def read_gradients(
    call: TrainCall, done: TrainDone, buffers: Sequence[Buffer], hidden_size: int, adapter_values: int
) -> SpanGradients:
    """What a server answered to a backward call over an adapter of so many values in these blocks.

    Raises BadMessage, and BadTensor for shapes that are not those of what was sent.
    """
    if len(buffers) != len(call.wants):
        raise BadMessage(f"{len(buffers)} gradients came, {len(call.wants)} were asked for")
    rest = iter(buffers)
    shapes = {
        HIDDEN: (call.rows, call.tokens, hidden_size),
        PROMPTS: (call.end - call.start, call.prompt_tokens, hidden_size),
        ADAPTER: (1, adapter_values),
    }
    found = {
        name: decode_rows(codec_named(done.codec) if name == HIDDEN else F32, next(rest), shapes[name])
        for name in GRADIENTS
        if name in call.wants
    }
    adapter = found.get(ADAPTER)
    return SpanGradients(
        found.get(HIDDEN),
        found.get(PROMPTS),
        None if adapter is None else adapter.view(-1),
        HopReport(done.queue_ms, done.compute_ms),
    )


def encode_rows(codec: Codec, tensor: Tensor) -> bytearray:
    """(…, E) as tokens of E values."""
    return codec.encode(tensor.detach().flatten(0, -2))


def decode_rows(codec: Codec, data: Buffer, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of this shape (…, E). Raises BadTensor where the length is another's."""
    n_tokens = 1
    for size in shape[:-1]:
        n_tokens *= size
    expected = codec.nbytes(n_tokens, shape[-1])
    if len(data) != expected:
        raise BadTensor(f"found {len(data)} bytes, expected {expected}: {shape} in {codec.name}")
    return codec.decode(data, shape[-1]).view(shape)
