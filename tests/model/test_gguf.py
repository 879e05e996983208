"""Import from GGUF: files written by the `gguf` package from known tensors, the real one, and broken ones."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from petalite.errors import InvalidArgument, InvalidCheckpoint, PetaliteError, UnsupportedModel
from petalite.kernels.rope import DefaultRope, Llama3Rope
from petalite.model.checkpoint import Checkpoint
from petalite.model.gguf import import_gguf
from petalite.model.gguf_file import GgufFile
from petalite.model.gguf_tokenizer import build_tokenizer
from petalite.model.span import load_span
from petalite.model.tokenizer import load_tokenizer
from petalite.node import smollm2 as packaged
from tests.helpers.checkpoints import byte_tokenizer, tiny_llama
from tests.helpers.disk import room_for

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows (LlamaModel.permute of convert_hf_to_gguf.py)."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, folder: Path, *, kind: Any = None, extra: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """The checkpoint in `folder` as llama.cpp's converter would write it; `changes` to its metadata, by
    key.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    raw = byte_tokenizer()
    tokens = [token for token, _ in sorted(raw.get_vocab().items(), key=lambda item: item[1])]
    values = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": TEMPLATE,
    }
    values["tokenizer.ggml.tokens"] = [*tokens, "ab"]
    values["tokenizer.ggml.token_type"] = [1] * 256 + [3, 3, 1]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (values | changes).items():
        add(writer, key, value)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        array = tensor.numpy()
        ours = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        stored = ours.get(name) or name.replace("lm_head", "output")
        if name.startswith("model.layers."):
            _, _, block, role = name.split(".", 3)
            part, _, suffix = role.rpartition(".")
            stored = f"blk.{block}.{next(key for key, value in BLOCK.items() if value == part)}.{suffix}"
            if part[-6:] in ("q_proj", "k_proj"):
                array = permuted(array, heads[part[-6]])
        if kind is not None and array.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, array)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture":
        writer.kv_data[0][key].value = value
    elif value is None:
        return
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_theta": 5e5},
    ],
)
def test_brings_back_every_tensor_and_setting(tmp_path: Path, config: dict[str, Any]) -> None:
    original = tiny_llama(tmp_path / "original", **config)
    seen: list[tuple[int, int]] = []
    imported = import_gguf(
        write_gguf(tmp_path / "x.gguf", original),
        tmp_path / "new" / "imported",
        progress=lambda done, total: seen.append((done, total)),
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (original, imported))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert Checkpoint.open(imported).config == Checkpoint.open(original).config
    assert seen == [(done, len(before)) for done in range(1, len(before) + 1)]
    tokenizer = load_tokenizer(Checkpoint.open(imported))
    assert tokenizer.encode_chat([{"role": "user", "content": "xab</s>"}]) == [
        *tokenizer.encode("x"),
        258,
        257,
    ]
    assert tokenizer.eos_ids == {257}
    # The manifest describes what was written, so the folder can be loaded, and names its own version.
    load_span(Checkpoint.open(imported), 0, 3)
    assert Checkpoint.open(imported).model_id("x") != Checkpoint.open(original).model_id("x")
    assert sorted(path.name for path in tmp_path.joinpath("new").iterdir()) == ["imported"]


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q4_1", 0.1)]
)
def test_dequantizes(tmp_path: Path, kind: str, tolerance: float) -> None:
    original = tiny_llama(tmp_path / "original")
    path = write_gguf(tmp_path / "x.gguf", original, kind=gguf.GGMLQuantizationType[kind])
    after = load_file(import_gguf(path, tmp_path / "imported") / "model.safetensors")
    for name, tensor in load_file(original / "model.safetensors").items():
        assert float((after[name] - tensor).norm() / tensor.norm()) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_writes_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    original = tiny_llama(tmp_path / "original")
    imported = import_gguf(write_gguf(tmp_path / "x.gguf", original), tmp_path / "imported", dtype=dtype)
    before, after = (load_file(folder / "model.safetensors") for folder in (original, imported))
    assert all(torch.equal(tensor.to(getattr(torch, dtype)), after[name]) for name, tensor in before.items())
    assert json.loads((imported / "config.json").read_text())["dtype"] == dtype


def test_the_real_file_by_hand(smollm2: Path) -> None:
    """Q4_1 (ggml-quants.c): blocks of 32 values, a half scale, a half minimum, low nibbles before high
    ones.
    """
    file = GgufFile(packaged._gguf_file())
    name, n_out, n_in = "blk.7.ffn_down.weight", 576, 1536
    assert file.tensors[name].shape == (n_out, n_in)
    blocks = np.frombuffer(file.data(name, n_out * n_in // 32 * 20), np.uint8).reshape(-1, 20)
    scale, least = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    nibbles = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
    expected = torch.from_numpy((scale * nibbles + least).reshape(n_out, n_in))
    read = Checkpoint.open(smollm2).read({"model.layers.7.mlp.down_proj.weight": (n_out, n_in)})
    assert torch.equal(read["model.layers.7.mlp.down_proj.weight"], expected)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_settings(tmp_path: Path, factor: float) -> None:
    original = tiny_llama(tmp_path / "original", rope_theta=5e5)
    rope = Llama3Rope(5e5, factor, 1.0, 4.0, 8192)
    factors = DefaultRope(5e5).inverse_frequencies(16) / rope.inverse_frequencies(16)
    path = write_gguf(tmp_path / "x.gguf", original, extra={"rope_freqs.weight": factors.numpy()})
    imported = import_gguf(path, tmp_path / "imported")
    assert Checkpoint.open(imported).config.attention.rope == rope


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", "Ġ12345", "Ġ", "ĠOK", "!!", "ĊĊ"]),
        ("smollm", ["I", "'m", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠOK", "!!", "ĊĊ"]),
        ("llama-bpe", ["I", "'m", "Ġ", "123", "45", "Ġ", "ĠOK", "!!ĊĊ"]),
        ("qwen2", ["I", "'m", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠOK", "!!ĊĊ"]),
    ],
)
def test_pre_tokenizers(pre: str, pieces: list[str]) -> None:
    """By the rules of each model's own tokenizer.json, applied by hand."""
    tokens = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
    }
    tokenizer = build_tokenizer(metadata)
    split = tokenizer.pre_tokenizer.pre_tokenize_str("I'm 12345  OK!!\n\n")
    assert [piece for piece, _ in split] == pieces
    assert tokenizer.encode("a").ids == [256, tokens.index("a")]
    assert tokenizer.encode("a", add_special_tokens=False).ids == [tokens.index("a")]
    assert (tokenizer.encode("é", add_special_tokens=False).ids == tokenizer.encode("e\u0301").ids[1:]) == (
        pre == "qwen2"
    )


@pytest.mark.slow
def test_tokenizes_as_the_conversion_of_transformers(smollm2: Path) -> None:
    """Where white space does not meet digits: that conversion leaves the splitting of digits out."""
    from transformers import AutoTokenizer

    file = packaged._gguf_file()
    reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = load_tokenizer(Checkpoint.open(smollm2))
    license = (Path(__file__).parents[2] / "LICENSE").read_text()
    for text in (license, "Hello  there\n\n\t", "def f(x):\n    return x  # naïve 🙂", "<|im_end|>x"):
        assert tokenizer.encode(text) == reference(text)["input_ids"]


NO_IDS = {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}

# -- what is refused, and what is left behind ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"general.architecture": "gpt2"}, UnsupportedModel, "architecture 'gpt2' is not supported"),
        ({"llama.expert_count": 8}, UnsupportedModel, "mixtures of experts"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedModel, "rope scaling 'longrope'"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModel, "rope over 8 of 16 dimensions"),
        ({"tokenizer.ggml.model": "llama"}, UnsupportedModel, "tokenizer is 'llama'"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            UnsupportedModel,
            "'tekken' is not supported; supported are gpt-2",
        ),
        ({"tokenizer.ggml.pre": None}, UnsupportedModel, "pre-tokenizer None"),
        ({"tokenizer.ggml.merges": ["a b c"]}, InvalidCheckpoint, "merge 'a b c'"),
        ({"tokenizer.ggml.merges": ["a zzz"]}, InvalidCheckpoint, "merges do not fit"),
        ({"tokenizer.ggml.token_type": [1]}, InvalidCheckpoint, "token types"),
        ({"tokenizer.ggml.tokens": ["a", "a"], **NO_IDS}, InvalidCheckpoint, "names a token twice"),
        ({"tokenizer.ggml.tokens": [1, 2], **NO_IDS}, InvalidCheckpoint, "not a list of texts"),
        ({"tokenizer.ggml.bos_token_id": 999}, InvalidCheckpoint, "bos_token_id 999 is outside"),
        ({"llama.block_count": 2}, UnsupportedModel, r"tensor 'blk\.2\..*has no place"),
        ({"llama.attention.head_count": 3}, InvalidCheckpoint, "num_attention_heads 3"),
        ({"llama.embedding_length": None}, InvalidCheckpoint, "hidden_size is None"),
        ({"llama.embedding_length": 128}, InvalidCheckpoint, "its settings make it"),
        ({"llama.attention.key_length": 24}, InvalidCheckpoint, r"k_proj.* \(48, 64\)"),
        ({"llama.block_count": 4}, InvalidCheckpoint, r"layers\.3\..* has shape None"),
        ({"tokenizer.ggml.tokens": 5}, InvalidCheckpoint, "not a list of texts"),
    ],
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], error: type, says: str
) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny_llama(tmp_path / "original"), **changes)
    with pytest.raises(error, match=says):
        import_gguf(path, tmp_path / "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["original", "x.gguf"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llama.rope.freq_base": "x"}, "rope_theta is 'x'"),
        ({"llama.attention.key_length": 2**31 - 2}, "head_dim"),  # whose factors would be gigabytes
        ({"llama.attention.head_count": "x"}, "num_attention_heads"),
    ],
)
def test_rope_factors_beside_broken_settings(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    original = tiny_llama(tmp_path / "original")
    path = write_gguf(tmp_path / "x.gguf", original, extra=extra, **changes)
    with pytest.raises(InvalidCheckpoint, match=says):
        import_gguf(path, tmp_path / "new")


@pytest.mark.parametrize("name", ["token_embd.weight", "rope_freqs.weight", "blk.0.attn_q.weight"])
def test_a_tensor_without_dimensions(tmp_path: Path, name: str) -> None:
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", tiny_llama(tmp_path / "original"), extra=extra)
    before, named, after = path.read_bytes().partition(name.encode())
    n_dimensions = after[0]
    path.write_bytes(before + named + bytes(4) + after[4 + 8 * n_dimensions :])
    with pytest.raises(InvalidCheckpoint, match=r"x\.gguf"):
        import_gguf(path, tmp_path / "new")


@pytest.mark.parametrize("beginning", ["a:b", "<s>:1", "$A", "two words"])
def test_a_beginning_that_templates_read_otherwise(beginning: str) -> None:
    tokens = [*(token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1]))]
    tokens[256] = beginning
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert build_tokenizer(metadata).encode("a").ids == [256, tokens.index("a")]


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    for name in ("blk.0.attn_sinks.weight", "blk.00.attn_norm.weight"):
        extra = {name: np.zeros(64, np.float32)}
        path = write_gguf(tmp_path / "x.gguf", tiny_llama(tmp_path / "original"), extra=extra)
        with pytest.raises(UnsupportedModel, match=name):
            import_gguf(path, tmp_path / "new")
        shutil.rmtree(tmp_path / "original")


def test_a_truncated_file_leaves_nothing(tmp_path: Path) -> None:
    """Cut in the metadata, in the tensor list, and within the last tensor."""
    whole = write_gguf(tmp_path / "x.gguf", tiny_llama(tmp_path / "original")).read_bytes()
    for size in (0, 3, 20, 500, 4000, len(whole) - 5000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InvalidCheckpoint, match=r"cut\.gguf"):
            import_gguf(tmp_path / "cut.gguf", tmp_path / "new")
        assert not list(tmp_path.glob("*new*"))


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    path = write_gguf(tmp_path / "x.gguf", tiny_llama(tmp_path / "original"))
    monkeypatch.setattr("petalite.model.gguf.write_tensors", full)
    with pytest.raises(InvalidArgument, match=r"cannot write .*new: No space left on device"):
        import_gguf(path, tmp_path / "new")
    monkeypatch.undo()
    for most in (1000, 3000, 10_000):  # in settings, tokenizer, weights
        with room_for(most), pytest.raises(InvalidArgument, match=r"cannot write .*new: File too large"):
            import_gguf(path, tmp_path / "new")
    assert not [entry for entry in tmp_path.iterdir() if "new" in entry.name]


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    path = write_gguf(tmp_path / "x.gguf", tiny_llama(tmp_path / "original"))
    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, tmp_path / "new", progress=interrupt)
    assert not [entry for entry in tmp_path.iterdir() if "new" in entry.name]


def test_never_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(InvalidArgument, match="exists already"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "here")
    with pytest.raises(InvalidArgument, match="int8"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "new", dtype="int8")
    with pytest.raises(InvalidCheckpoint, match="there is no file"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "new")


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InvalidArgument, match=r"petalite\[gguf\]"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "new")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file of a few keys and tensors."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("yes", True)
    writer.add_tensor("t", np.arange(8, dtype=np.float32).reshape(2, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, path.read_bytes()


def test_reads_what_the_package_writes(small: tuple[Path, bytes]) -> None:
    file = GgufFile(small[0])
    assert file.metadata == {
        "general.architecture": "llama",
        "words": ["a", "bc"],
        "numbers": [1, 2, 3],
        "yes": True,
    }
    assert file.tensors["t"].shape == (2, 4)
    assert struct.unpack("<8f", file.data("t", 32)) == tuple(range(8))


@settings(max_examples=300, deadline=None)
@given(
    at=st.integers(0, 250),
    patch=st.binary(min_size=1, max_size=8),
    cut=st.one_of(st.none(), st.integers(0, 300)),
)
def test_any_bytes_are_read_or_refused(
    small: tuple[Path, bytes], at: int, patch: bytes, cut: int | None
) -> None:
    """Lengths of exabytes, endless lists and unknown types included: one of our own errors, and soon."""
    path, good = small
    changed = path.with_name("changed.gguf")
    changed.write_bytes((good[:at] + patch + good[at + len(patch) :])[:cut])
    try:
        file = GgufFile(changed)
        for name, tensor in file.tensors.items():
            file.data(name, int(np.prod(tensor.shape, dtype=object)) * 4)
    except PetaliteError as error:
        assert "changed.gguf" in str(error)
