"""LoRA (arXiv 2106.09685) on a model's linears: adapters as files, and linears that compute with one.

An adapter adds scale · B · A to the weight of some linears of some blocks; A is (r, inputs), B (outputs, r),
and the scale alpha / r. Two files hold one. Ours, which clients send to servers: safetensors with

    blocks.{block}.{role}.lora_A, blocks.{block}.{role}.lora_B     float32 or bfloat16

by the roles of `TensorNames.block` (query, key, value, output, gate, up, down; an expert's experts.N.gate …;
BLOOM's qkv, output, up, down), and in its metadata `model`, the model id, and `alpha`. And PEFT's folder,
`adapter_config.json` beside `adapter_model.safetensors`, by the family's own names.

A block stacks some roles into one linear and reorders the rows of some; so are the factors (`stack`): one
product with all A, one with all B, whose blocks off the diagonal are zero. Every byte may be a stranger's.
Knows files and tensors; knows no session and no cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from petalite.errors import InvalidAdapter, InvalidCheckpoint, WrongModel
from petalite.kernels.linear import Linear
from petalite.model.block import Block
from petalite.model.config import ModelConfig
from petalite.model.families import TensorNames
from petalite.model.tensorfile import (
    DTYPES,
    TensorInfo,
    header_end,
    mapped_tensors,
    parse_header,
    read_header,
)

MAX_RANK = 1024
MAX_HEADER_BYTES = 4 << 20
_A, _B = SIDES = ("lora_A", "lora_B")
_STORED = {name: DTYPES[name] for name in ("F32", "BF16", "F16")}
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What PEFT's config may ask for beyond A and B: the values that ask for nothing.
_PEFT_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None,),
}

Place = tuple[int, str]  # a block, and a role in it


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The factors of one LoRA, checked against a model."""

    digest: bytes
    tensors: Mapping[str, Tensor]  # float32, named as in our file
    scales: Mapping[Place, float]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def names(self, start: int, end: int) -> list[str]:
        """Of the tensors in the blocks [start, end), in the order in which gradients travel."""
        places = sorted(place for place in self.scales if start <= place[0] < end)
        return sorted(name for place in places for name in names_of(*place))


def names_of(block: int, role: str) -> tuple[str, str]:
    """A's and B's in our file."""
    return f"blocks.{block}.{role}.{_A}", f"blocks.{block}.{role}.{_B}"


# -- our file --------------------------------------------------------------------------------------------


def write_adapter(tensors: Mapping[str, Tensor], *, model: str, alpha: float) -> bytes:
    """The file of factors named as in `Adapter.tensors`, of the model with the id `model`. The same factors
    give the same bytes, and so the same digest.
    """
    header: dict[str, Any] = {"__metadata__": {"alpha": repr(float(alpha)), "model": model}}
    data, position = [], 0
    for name, tensor in sorted(tensors.items()):
        stored = tensor.detach().to("cpu", torch.float32).contiguous().view(-1).view(torch.uint8)
        data.append(bytes(stored.numpy()))
        end = position + len(data[-1])
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *data))


def read_adapter(
    blob: bytes | memoryview,
    model: str,
    config: ModelConfig,
    kind: type[Block],
    *,
    digest: bytes | None = None,
) -> Adapter:
    """Raises WrongModel, and InvalidAdapter for anything that is not a LoRA of this model's blocks.
    `digest` is the file's, where it is known already.
    """
    digest = digest or hashlib.sha256(blob).digest()
    blob = memoryview(blob)
    length = struct.unpack("<Q", blob[:8])[0] if len(blob) > 8 else 0
    if not 0 < length <= min(MAX_HEADER_BYTES, len(blob) - 8):
        raise InvalidAdapter(
            f"no safetensors file of an adapter: {len(blob)} bytes with a header of {length}, "
            f"which may be {MAX_HEADER_BYTES} at most"
        )
    text = bytes(blob[8 : 8 + length])
    try:
        infos = parse_header(text, len(blob) - 8 - length, source="the adapter")
    except InvalidCheckpoint as error:
        raise InvalidAdapter(str(error)) from error
    metadata = json.loads(text).get("__metadata__", {})
    if metadata.get("model") != model:
        raise WrongModel(f"the adapter is for {str(metadata.get('model'))[:200]!r}, this is {model!r}")
    alpha = _number(metadata.get("alpha"), "alpha in its metadata")
    ranks = _check_pairs({name: info.shape for name, info in infos.items()}, config, kind)
    tensors = {name: _stored_tensor(blob, name, info) for name, info in infos.items()}
    return Adapter(digest, _finite(tensors), {place: alpha / rank for place, rank in ranks.items()})


def _stored_tensor(blob: memoryview, name: str, info: TensorInfo) -> Tensor:
    dtype = _STORED.get(info.dtype)
    if dtype is None:
        raise InvalidAdapter(f"{name!r} is stored in {info.dtype}; an adapter's may be {', '.join(_STORED)}")
    raw = bytearray(blob[info.start : info.end])  # our own memory, and aligned
    return torch.frombuffer(raw, dtype=dtype).view(info.shape).float()


# -- PEFT's folder ---------------------------------------------------------------------------------------


def read_peft(folder: Path, config: ModelConfig, kind: type[Block], names: TensorNames) -> Adapter:
    """Raises InvalidAdapter for what is broken, asks for more than A and B, or does not fit the model.

    The digest is over what shapes the arithmetic: the weights' file and the scale's rule.
    """
    settings = _peft_settings(folder / _PEFT_CONFIG)
    path = folder / _PEFT_WEIGHTS
    try:
        if header_end(path) > MAX_HEADER_BYTES:
            raise InvalidAdapter(f"{path} has a header of over {MAX_HEADER_BYTES} bytes; no LoRA needs one")
        infos = read_header(path)
        ours = {_our_name(name, config, kind, names): name for name in infos}
        if len(ours) != len(infos):
            raise InvalidAdapter(f"{path} has two tensors for one A or B of a linear")
        ranks = _check_pairs({name: infos[stored].shape for name, stored in ours.items()}, config, kind)
        for name, info in infos.items():
            if info.dtype not in _STORED:
                raise InvalidAdapter(f"{name!r} of {path} is in {info.dtype}; known are {', '.join(_STORED)}")
        mapped = dict(mapped_tensors(path, infos))
        with path.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    except (InvalidCheckpoint, OSError) as error:
        raise InvalidAdapter(str(error)) from error
    alpha = _number(settings.get("lora_alpha", 8), f"lora_alpha of {folder / _PEFT_CONFIG}")
    root = bool(settings.get("use_rslora"))
    rule = json.dumps({"alpha": alpha, "root": root, "weights": weights}, sort_keys=True)
    tensors = {name: mapped[stored].float().clone() for name, stored in ours.items()}
    scales = {place: alpha / (math.sqrt(rank) if root else rank) for place, rank in ranks.items()}
    return Adapter(hashlib.sha256(rule.encode()).digest(), _finite(tensors), scales)


def _peft_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidAdapter(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise InvalidAdapter(f"{path} holds no map of settings")
    for key, plain in _PEFT_PLAIN.items():
        if key in settings and settings[key] not in plain:
            raise InvalidAdapter(
                f"{path} has {key} = {str(settings[key])[:50]}; a plain LoRA is served, with "
                f"{' or '.join(map(repr, plain))}"
            )
    return settings


def _our_name(stored: str, config: ModelConfig, kind: type[Block], names: TensorNames) -> str:
    """`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` → `blocks.3.query.lora_A`."""
    for side in SIDES:
        place, found, _ = stored.removeprefix("base_model.model.").partition(f".{side}.")
        if found and stored.endswith((f".{side}.weight", f".{side}.default.weight")):
            break
    else:
        raise InvalidAdapter(f"the adapter has a tensor {stored[:200]!r}, which is no A or B of a linear")
    before, after = names.block_prefix.split("{block}")
    for prefix in dict.fromkeys((names.outer + before, before)):
        number, dot, rest = place.removeprefix(prefix).partition(".")
        if place.startswith(prefix) and dot and number.isascii() and number.isdigit() and len(number) < 6:
            roles = {names.of(role): role for roles in kind.stacks(config).values() for role in roles}
            if after == "." and rest in roles:
                return f"blocks.{int(number)}.{roles[rest]}.{side}"
    raise InvalidAdapter(f"the adapter targets {place[:200]!r}, which is no linear of this model's blocks")


# -- what both have in common ----------------------------------------------------------------------------


def _check_pairs(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, kind: type[Block]
) -> dict[Place, int]:
    """The rank of each pair. Raises InvalidAdapter unless every tensor is half of one that fits."""
    known = kind.tensor_shapes(config)
    linears = {role for roles in kind.stacks(config).values() for role in roles}
    places = set()
    for name in shapes:
        place = _place(name)
        if place is None or place[0] >= config.n_blocks or place[1] not in linears:
            raise InvalidAdapter(
                f"the adapter has a tensor {name[:200]!r}; expected blocks.B.ROLE.lora_A or lora_B with B "
                f"below {config.n_blocks} and ROLE of {', '.join(sorted(linears)[:12])}"
            )
        places.add(place)
    ranks: dict[Place, int] = {}
    for block, role in places:
        n_out, n_in = known[f"{role}.weight"]
        a, b = (shapes.get(side, ()) for side in names_of(block, role))
        rank = a[0] if len(a) == 2 else 0
        if a != (rank, n_in) or b != (n_out, rank) or not 0 < rank <= MAX_RANK:
            raise InvalidAdapter(
                f"the adapter's A and B of {role} in block {block} have shapes {a} and {b}; expected "
                f"(r, {n_in}) and ({n_out}, r) with r of 1 to {MAX_RANK}"
            )
        ranks[block, role] = rank
    if not ranks:
        raise InvalidAdapter("the adapter has no tensors")
    return ranks


def _place(name: str) -> Place | None:
    parts = name.split(".")
    if len(parts) < 4 or parts[0] != "blocks" or parts[-1] not in SIDES:
        return None
    number = parts[1]
    if not (number.isascii() and number.isdigit() and len(number) < 6 and str(int(number)) == number):
        return None
    return int(number), ".".join(parts[2:-1])


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and 0 < abs(number) < 1e6):
        raise InvalidAdapter(f"{what} is {str(value)[:50]!r}; expected a number")
    return number


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidAdapter(f"the adapter has NaN or Inf in {name!r}")
    return tensors


# -- computing with one ----------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]


def stack(
    kind: type[Block], config: ModelConfig, block: int, adapter: Adapter, device: torch.device
) -> dict[str, Pair]:
    """Of each linear of a block that is adapted: A (R, inputs) and scale · B (outputs, R), R the sum of its
    roles' ranks. Differentiable in the adapter's tensors.
    """
    shapes = kind.tensor_shapes(config)
    pairs = {}
    for name, roles in kind.stacks(config).items():
        factors = {
            role: [adapter.tensors[side].to(device) for side in names_of(block, role)]
            for role in roles
            if (block, role) in adapter.scales
        }
        if not factors:
            continue
        width, first, up = sum(len(a) for a, _ in factors.values()), 0, []
        for role in roles:
            if role not in factors:
                up.append(torch.zeros(shapes[f"{role}.weight"][0], width, device=device))
                continue
            b = factors[role][1] * adapter.scales[block, role]
            rank = b.shape[1]
            rows = kind.reordered(config, block, role, b)
            up.append(pad(rows, (first, width - first - rank)))
            first += rank
        pairs[name] = (torch.cat([a for a, _ in factors.values()]), torch.cat(up))
    return pairs


class LoraLinear:
    """x (T, K) → base(x) + x · Aᵀ · Bᵀ. Differentiable in x, A and B."""

    def __init__(self, base: Linear, pair: Pair) -> None:
        self._base = base
        self._down, self._up = pair

    def __call__(self, x: Tensor) -> Tensor:
        low = linear(x, self._down.to(x.dtype))
        return torch.addmm(self._base(x), low, self._up.to(x.dtype).t())

    def dense(self) -> Tensor:
        weight = self._base.dense()
        change = pad(self._up @ self._down, (0, weight.shape[1] - self._down.shape[1]))
        return weight + change.to(weight.dtype)

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + self._down.nbytes + self._up.nbytes


def with_lora(block: Block, pairs: Mapping[str, Pair]) -> Block:
    """The block with these factors added to its linears."""
    if not pairs:
        return block
    return block.with_linears({name: LoraLinear(block.linears[name], pair) for name, pair in pairs.items()})
