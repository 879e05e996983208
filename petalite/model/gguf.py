"""Import a GGUF file of the Llama architecture as a checkpoint folder.

What llama.cpp's converter does on the way in is undone: tensors get their names back, query and key rows
their order, the rope settings their keys. Quantized tensors are dequantized; the folder's weights are
float32 unless another dtype is asked for, because a 4-bit value times its scale plus its minimum is exact
in float32 (the imported model then agrees with llama.cpp on a float32 file to 1.4e-6 in its logits), while
float16 rounds it by 2e-4 and bfloat16 by 2e-3, at half the disk. Needs the `gguf` extra. Knows files; knows
nothing of running the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petalite.errors import InvalidArgument, InvalidCheckpoint, PetaliteError, UnsupportedModel
from petalite.kernels.rope import DefaultRope, Llama3Rope
from petalite.model.checkpoint import FolderFiles
from petalite.model.config import AttentionConfig, ModelConfig
from petalite.model.families import FAMILIES
from petalite.model.gguf_file import GgufFile
from petalite.model.gguf_tokenizer import build_tokenizer, token_at
from petalite.model.hashing import file_digests
from petalite.model.llama import tensor_shapes
from petalite.model.manifest import Manifest
from petalite.model.tensorfile import DTYPES, stored_bytes, write_tensors

_TARGET_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ARCHITECTURES = ("llama",)

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1's scaling comes to, pair by pair

Progress = Callable[[int, int], None]  # (done, total)


def import_gguf(
    source: str | Path, target: str | Path, *, dtype: str = "float32", progress: Progress | None = None
) -> Path:
    """Write the folder `target` with everything a checkpoint needs; whole, or not at all. `progress` counts
    tensors.

    Raises InvalidArgument if `target` exists or the extra is missing, InvalidCheckpoint for a broken file,
    and UnsupportedModel for an architecture, tokenizer or tensor that has no counterpart here.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if dtype not in _TARGET_DTYPES:
        raise InvalidArgument(f"dtype {dtype!r} is not known; choose one of {', '.join(_TARGET_DTYPES)}")
    if os.path.exists(target):  # noqa: PTH110 -- Path's raises for a name that is too long
        raise InvalidArgument(f"{target} exists already; give a folder that does not, or remove it first")
    file = _Source(source)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        _write_folder(file, scratch, dtype, progress or (lambda done, total: None))
        scratch.rename(target)
    except PetaliteError:
        raise
    except OSError as error:
        raise InvalidArgument(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


class _Source:
    """A GGUF file with its tensors dequantized, one at a time."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise InvalidArgument(
                "importing GGUF files needs an extra: pip install 'petalite[gguf]'"
            ) from error
        if not os.path.isfile(path):  # noqa: PTH113 -- as above
            raise InvalidCheckpoint(f"there is no file {path}")
        self.path = path
        self._gguf = gguf
        self._file = GgufFile(path)
        self.metadata = self._file.metadata

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    @property
    def names(self) -> list[str]:
        return list(self._file.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def read(self, name: str) -> Tensor:
        """The tensor in float32."""
        import numpy as np

        entry = self._file.tensors[name]
        try:
            kind = self._gguf.GGMLQuantizationType(entry.type)
            block_values, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise UnsupportedModel(
                f"{self.path}: {name} is of ggml type {entry.type}, which is not read"
            ) from error
        if not entry.shape or not math.prod(entry.shape) or entry.shape[-1] % block_values:
            raise InvalidCheckpoint(
                f"{self.path}: {name} has shape {entry.shape}, no whole blocks of {kind.name}"
            )
        nbytes = math.prod(entry.shape) // block_values * block_bytes
        stored = np.frombuffer(self._file.data(name, nbytes), dtype=np.uint8)
        try:
            values = self._gguf.quants.dequantize(stored.reshape(*entry.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise UnsupportedModel(f"{self.path}: {name} is {kind.name}, which is not read") from error
        # What was dequantized is fresh; what was not is the read-only file.
        values = values if values.flags.writeable else values.copy()
        return torch.from_numpy(values).to(torch.float32).reshape(entry.shape)


def _write_folder(file: _Source, folder: Path, dtype: str, progress: Progress) -> None:
    config = _config(file) | {"dtype": dtype}
    model = ModelConfig.from_dict(config, source=str(file.path))
    _write_json(folder / "config.json", config)
    metadata = file.metadata
    tokenizer = build_tokenizer(metadata).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, model))
    _write_json(folder / "generation_config.json", _generation_config(metadata))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_weights(file, folder, model, dtype, progress)


def _write_weights(file: _Source, folder: Path, model: ModelConfig, dtype: str, progress: Progress) -> None:
    stored = _TARGET_DTYPES[dtype]
    named = _renamed(file, model)
    manifest: dict[str, tuple[str, tuple[int, ...], str]] = {}

    def tensors() -> Iterator[Tensor]:
        for done, (name, source) in enumerate(named.items(), start=1):
            tensor = _reordered(file.read(source), source, model).to(DTYPES[stored]).contiguous()
            digest = hashlib.sha256(stored_bytes(tensor)).hexdigest()
            manifest[name] = (stored, tuple(tensor.shape), digest)
            yield tensor
            progress(done, len(named))

    shapes = {name: (DTYPES[stored], file.shape(source)) for name, source in named.items()}
    write_tensors(folder / "model.safetensors", shapes, tensors())
    others = file_digests(FolderFiles(folder).find)
    (folder / Manifest.FILE).write_text(Manifest(manifest, others).to_json(), encoding="utf-8")


# -- tensors ---------------------------------------------------------------------------------------------


def _renamed(file: _Source, model: ModelConfig) -> dict[str, str]:
    """Checkpoint name → GGUF name: the edges, then block by block, so that a span is one stretch of the
    file.
    """
    found: dict[tuple[int, str], str] = {}
    for source in file.names:
        if source == _ROPE_FACTORS:
            continue
        match = _BLOCK_NAME.fullmatch(source)
        if source in _MODEL_TENSORS:
            found[-1, _MODEL_TENSORS[source]] = source
        elif match and match[2] in _BLOCK_TENSORS and int(match[1]) < model.n_blocks:
            block = int(match[1])
            found[block, f"model.layers.{block}.{_BLOCK_TENSORS[match[2]]}.{match[3]}"] = source
        else:
            raise UnsupportedModel(f"{file.path}: tensor {source!r} has no place in a {model.family} model")
    named = {name: found[block, name] for block, name in sorted(found)}
    shapes = {name: file.shape(source) for name, source in named.items()}
    expected = _expected_shapes(model)
    for name in sorted(expected.keys() | shapes):
        if shapes.get(name) != expected.get(name):
            raise InvalidCheckpoint(
                f"{file.path}: tensor {name} has shape {shapes.get(name)}; its settings make it "
                f"{expected.get(name)}"
            )
    return named


def _expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    names = FAMILIES[model.family].names
    table = (model.vocab_size, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {names.embedding: table, names.norm: (model.hidden_size,)}
    if not model.tied_embeddings:
        shapes[names.head] = table
    for block in range(model.n_blocks):
        for part, shape in tensor_shapes(model).items():
            role, _, kind = part.rpartition(".")
            shapes[f"{names.block_prefix.format(block=block)}{names.of(role)}.{kind}"] = shape
    return shapes


def _reordered(tensor: Tensor, source: str, model: ModelConfig) -> Tensor:
    """Undo the converter's order of query and key rows: pairs (2i, 2i + 1) become (i, i + D/2) again."""
    if ".attn_q." not in source and ".attn_k." not in source:
        return tensor
    pairs = tensor.view(-1, model.attention.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


# -- settings --------------------------------------------------------------------------------------------


def _config(file: _Source) -> dict[str, Any]:
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: architecture {architecture!r} is not supported; "
            f"supported are {', '.join(_ARCHITECTURES)}"
        )

    def value(key: str) -> Any:
        found = file.metadata.get(f"{architecture}.{key}")
        return _shortest(found) if isinstance(found, float) else found

    if value("expert_count"):
        raise UnsupportedModel(f"{file.path}: mixtures of experts are not supported")
    if "token_embd.weight" not in file:
        raise InvalidCheckpoint(f"{file.path} has no token_embd.weight")
    heads, hidden = value("attention.head_count"), value("embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv") or heads,
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": value("context_length"),
        "vocab_size": (file.shape("token_embd.weight") or (None,))[0],
        "tie_word_embeddings": "output.weight" not in file,
        "attention_bias": "blk.0.attn_q.bias" in file,
        "mlp_bias": "blk.0.ffn_up.bias" in file,
        "rope_theta": value("rope.freq_base") or 10_000.0,
    }
    if value("attention.key_length"):
        config["head_dim"] = value("attention.key_length")
    elif isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        config["head_dim"] = hidden // heads
    rotated = value("rope.dimension_count")
    if rotated and rotated != config.get("head_dim"):
        raise UnsupportedModel(
            f"{file.path}: rope over {rotated} of {config.get('head_dim')} dimensions is not supported"
        )
    attention = ModelConfig.from_dict(config, source=str(file.path)).attention
    scaling = _rope_scaling(file, value, attention)
    if scaling:
        config["rope_scaling"] = scaling
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = token_at(file.metadata, key)
        if token is not None:
            config[key] = token[0]
    return config


def _rope_scaling(
    file: _Source, value: Callable[[str], Any], attention: AttentionConfig
) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file:
        return _llama3_scaling(file, attention)
    kind = value("rope.scaling.type")
    match kind:
        case None | "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": value("rope.scaling.factor")}
        case "yarn":
            original = value("rope.scaling.original_context_length")
            return {
                "rope_type": "yarn",
                "factor": value("rope.scaling.factor"),
                "original_max_position_embeddings": original,
            }
    raise UnsupportedModel(f"{file.path}: rope scaling {kind!r} is not supported; none, linear and yarn are")


def _llama3_scaling(file: _Source, attention: AttentionConfig) -> dict[str, Any]:
    """The settings whose factors the file holds: Llama 3.1's (factor 8) or 3.2's (32), the two that were
    released.
    """
    stored = file.read(_ROPE_FACTORS).flatten()
    head_dim, plain = attention.head_dim, attention.rope
    assert isinstance(plain, DefaultRope)
    for factor in (8.0, 32.0):
        scaled = Llama3Rope(plain.theta, factor, 1.0, 4.0, 8192).inverse_frequencies(head_dim)
        factors = plain.inverse_frequencies(head_dim) / scaled
        if factors.shape == stored.shape and torch.allclose(factors, stored, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise UnsupportedModel(
        f"{file.path}: its rope factors ({_ROPE_FACTORS}) are not those of Llama 3.1 or 3.2"
    )


def _tokenizer_config(metadata: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = token_at(metadata, f"{name}_token_id")
        if token is not None:
            config[f"{key}_token"] = token[1]
    return config


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Every id that ends a text: of the text, of a turn, of a message."""
    config: dict[str, Any] = {}
    ends = [token_at(metadata, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(token[0] for token in ends if token is not None))
    if ids:
        config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    for key, name in (("bos", "bos"), ("pad", "padding")):
        token = token_at(metadata, f"{name}_token_id")
        if token is not None:
            config[f"{key}_token_id"] = token[0]
    return config


def _shortest(value: float) -> float:
    """The plainest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    if not math.isfinite(value):
        return value
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if torch.tensor(float(text), dtype=torch.float32) == torch.tensor(value, dtype=torch.float32):
            return float(text)
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
