"""Blocks and edges against transformers, on tiny random checkpoints of every family and flag.

The same logits within 1e-4 however the tokens are fed: at once, in chunks, one by one, and packed with
strangers' rows; over the whole model and over spans joined end to end.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from petalite.errors import BadTensor, InvalidArgument, InvalidCheckpoint, WrongSpan
from petalite.model import loading
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import Edges, load_edges
from petalite.model.span import BlockSpan, load_span
from tests.helpers.checkpoints import tiny_llama

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", **YARN}},
    "rope_parameters": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen2 window": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "smollm3": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "pad_token_id": 0,
        "no_rope_layers": [1, 0, 1],
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "bloom": {"model_type": "bloom"},
    "bloom, 112 heads": {
        "model_type": "bloom",
        "n_head": 112,
        "num_attention_heads": 112,
        "hidden_size": 448,
        "n_embed": 448,
    },
    "bloom, residual after norm": {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
}
N_TOKENS = 41


class Loaded:
    """A checkpoint, its blocks and edges, and what transformers says of some token ids."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.n_blocks = self.checkpoint.config.n_blocks
        self.span: BlockSpan = load_span(self.checkpoint, 0, self.n_blocks, dtype=dtype)
        self.edges: Edges = load_edges(self.checkpoint, dtype=dtype)
        self.ids = torch.randint(0, 256, (N_TOKENS,), generator=torch.Generator().manual_seed(1))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.inference_mode():
            self.expected = model.eval()(self.ids.unsqueeze(0)).logits[0]

    def logits(self, chunks: Sequence[int]) -> Tensor:
        """The ids in chunks of these sizes, in a row of their own."""
        cache = self.span.new_cache()
        row = cache.open_row(N_TOKENS)
        outputs = []
        for end, size in zip(itertools.accumulate(chunks), chunks, strict=True):
            hidden = self.edges.embed(self.ids[end - size : end])
            outputs.append(self.span.forward(hidden, [Segment(row, end - size, size)], cache))
        assert cache.length(row) == N_TOKENS
        return self.edges.head(torch.cat(outputs))


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp("checkpoint")
    yield Loaded(tiny_llama(folder, **CONFIGS[request.param]))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


CHUNKINGS = {"prefill": [41], "chunks": [1, 16, 4, 20], "decode": [1] * 41, "prefill, decode": [33, *[1] * 8]}


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_logits_equal_those_of_transformers(loaded: Loaded, chunks: list[int]) -> None:
    close(loaded.logits(chunks), loaded.expected)


def test_packed_with_strangers(loaded: Loaded) -> None:
    """Two strangers' rows, prefilling and decoding at other positions in the same steps, change nothing."""
    cache = loaded.span.new_cache()
    stranger, row, other = (cache.open_row(64) for _ in range(3))
    generator = torch.Generator().manual_seed(2)

    def step(parts: list[tuple[int, int, Tensor]]) -> list[Tensor]:
        segments = [Segment(number, position, len(hidden)) for number, position, hidden in parts]
        output = loaded.span.forward(torch.cat([hidden for *_, hidden in parts]), segments, cache)
        return list(output.split([segment.n_tokens for segment in segments]))

    def noise(n_tokens: int) -> Tensor:
        return torch.randn(n_tokens, loaded.span.config.hidden_size, generator=generator)

    hidden = loaded.edges.embed(loaded.ids)
    outputs = [step([(stranger, 0, noise(9)), (row, 0, hidden[:20]), (other, 0, noise(3))])[1]]
    outputs.append(step([(row, 20, hidden[20:21]), (stranger, 9, noise(1))])[0])
    outputs.append(step([(other, 2, noise(30)), (stranger, 10, noise(1)), (row, 21, hidden[21:])])[2])
    close(loaded.edges.head(torch.cat(outputs)), loaded.expected)


def test_spans_joined_end_to_end(loaded: Loaded) -> None:
    """Separately loaded spans, and parts of the whole span, give what the whole gives."""
    hidden = loaded.edges.embed(loaded.ids)
    segments = [Segment(0, 0, N_TOKENS)]
    for start in range(loaded.n_blocks):
        apart = load_span(loaded.checkpoint, start, start + 1)
        cache = apart.new_cache()
        assert cache.open_row(64) == 0
        result = apart.forward(hidden, segments, cache)
        cache = loaded.span.new_cache()
        assert cache.open_row(64, start, start + 1) == 0
        part = loaded.span.forward(hidden, segments, cache, start=start, end=start + 1)
        assert torch.equal(result, part)
        hidden = result
    close(loaded.edges.head(hidden), loaded.expected)


def test_stateless_rows_equal_cached_ones(loaded: Loaded) -> None:
    hidden = loaded.edges.embed(loaded.ids[:40]).view(2, 20, -1)
    result = loaded.span.forward_stateless(hidden)
    for row in range(2):
        cache = loaded.span.new_cache()
        cached = loaded.span.forward(hidden[row], [Segment(cache.open_row(20), 0, 20)], cache)
        torch.testing.assert_close(result[row], cached, rtol=1e-5, atol=1e-5)


def test_gradient_equals_that_of_transformers(loaded: Loaded) -> None:
    """d(loss)/d(embeddings) of a whole sequence, through every block."""
    folder = loaded.checkpoint.folder
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    edges = loaded.edges
    ours, theirs = (edges._embedding[loaded.ids].unsqueeze(0).requires_grad_() for _ in range(2))
    hidden = ours if edges._embedding_norm is None else edges._normed(ours, edges._embedding_norm)
    weight = torch.randn(N_TOKENS, 260, generator=torch.Generator().manual_seed(3))
    (model(inputs_embeds=theirs).logits[0] * weight).sum().backward()
    (edges.head(loaded.span.forward_stateless(hidden)[0]) * weight).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("name", ["gqa", "biases", "yarn", "qwen3", "mistral", "bloom", "mixtral"])
def test_bfloat16_stays_within_three_per_cent(name: str, tmp_path: Path) -> None:
    """Relative L2 error of the logits against float32 transformers. bfloat16 keeps 8 bits, 0.4 % a rounding;
    transformers' own bfloat16 is off by as much.
    """
    loaded = Loaded(tiny_llama(tmp_path, **CONFIGS[name]), torch.bfloat16)
    for chunks in CHUNKINGS.values():
        logits = loaded.logits(chunks)
        assert logits.dtype == torch.float32
        assert float((logits - loaded.expected).norm() / loaded.expected.norm()) < 0.03


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["bloom", "mixtral"])
def test_other_blocks_quantize_too(name: str, quant: str, tmp_path: Path) -> None:
    loaded = Loaded(tiny_llama(tmp_path, **CONFIGS[name]))
    loaded.span = load_span(loaded.checkpoint, 0, loaded.n_blocks, quant=quant, cache=tmp_path / "cache")
    bound = 0.03 if quant == "int8" else 0.5
    off = (loaded.logits([41]) - loaded.expected).norm(dim=1) / loaded.expected.norm(dim=1)
    assert float(off.median()) < bound  # a token near a tie of the router may go to another expert


def test_bloom_saved_with_its_head_has_longer_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_llama(tmp_path, **CONFIGS["bloom"]) / "model.safetensors"
    expected = Loaded(tmp_path).logits([41])
    save_file({f"transformer.{name}": tensor for name, tensor in load_file(path).items()}, path)
    close(Loaded(tmp_path).logits([41]), expected)


def test_every_token_count_takes_the_same_path(tmp_path: Path) -> None:
    """Steps too short for the linear kernel are padded; nobody sees the padding."""
    loaded = Loaded(tiny_llama(tmp_path))
    for size in range(1, 7):
        chunks = [size] * (N_TOKENS // size)
        close(
            loaded.logits([*chunks, N_TOKENS - sum(chunks)] if N_TOKENS % size else chunks), loaded.expected
        )


def test_weights_are_counted(tmp_path: Path) -> None:
    loaded = Loaded(tiny_llama(tmp_path, attention_bias=True))
    per_block = sum(t.nbytes for n, t in loaded.checkpoint.read(block_shapes(loaded, 0)).items())
    assert loaded.span.nbytes == per_block * loaded.n_blocks
    assert loaded.span.token_bytes() == 2 * 2 * 16 * 4 * loaded.n_blocks
    assert loaded.span.token_bytes(0, 1) == 2 * 2 * 16 * 4
    assert loaded.edges.nbytes in ((260 * 64 + 64) * 4, (272 * 64 + 64) * 4)  # native: whole panels of rows


def block_shapes(loaded: Loaded, block: int) -> dict[str, tuple[int, ...]]:
    from safetensors.torch import load_file

    tensors = load_file(loaded.checkpoint.folder / "model.safetensors")
    return {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(f"model.layers.{block}.")}


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 4), (2, 2), (2, 1), (3, 4)])
def test_blocks_outside_the_model(start: int, end: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"blocks .* are outside the model; .* has blocks 0:3"):
        load_span(Checkpoint.open(tiny_llama(tmp_path)), start, end)


def test_a_dtype_that_does_not_compute(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="int8"):
        load_span(Checkpoint.open(tiny_llama(tmp_path)), 0, 1, dtype=torch.int8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_name_their_block(value: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_llama(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    tensors["model.norm.weight"][0] = value
    save_file(tensors, path)
    checkpoint = Checkpoint.open(tmp_path)
    load_span(checkpoint, 2, 3)
    with pytest.raises(InvalidCheckpoint, match=r"block 1 has NaN or Inf in .*up_proj"):
        load_span(checkpoint, 0, 3)
    with pytest.raises(InvalidCheckpoint, match=r"NaN or Inf in 'model.norm.weight'"):
        load_edges(checkpoint)


def test_after_an_error_no_memory_is_taken_early(tmp_path: Path, monkeypatch) -> None:
    """That of linears whose blocks will not be read: four in each."""
    model = tiny_llama(tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][0] = torch.nan
    save_file(tensors, model / "model.safetensors")
    taken, never = [], threading.Event()

    def take(memory: Tensor) -> None:
        taken.append(memory.nbytes)
        never.wait(0.05)

    monkeypatch.setattr(loading, "FEW_BYTES", 0)
    monkeypatch.setattr(loading, "take_pages", take)
    checkpoint = Checkpoint.open(model)
    with pytest.raises(InvalidCheckpoint, match="block 0 has NaN"):
        load_span(checkpoint, 0, 3)
    assert len(taken) < 3 * 4


def test_a_tensor_that_the_config_knows_nothing_of(tmp_path: Path) -> None:
    """A bias that config.json does not announce would be left out and the model be another one."""
    from safetensors.torch import load_file, save_file

    path = tiny_llama(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # harmless
    save_file(tensors, path)
    load_span(Checkpoint.open(tmp_path), 0, 1)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, path)
    with pytest.raises(InvalidCheckpoint, match=r"q_proj\.bias"):
        load_span(Checkpoint.open(tmp_path), 0, 1)


def test_hidden_states_of_the_wrong_shape(tmp_path: Path) -> None:
    span = load_span(Checkpoint.open(tiny_llama(tmp_path)), 1, 3)
    cache = span.new_cache()
    row = cache.open_row(8)
    for hidden in (
        torch.zeros(2, 64),
        torch.zeros(3, 63),
        torch.zeros(3),
        torch.zeros(3, 64, dtype=torch.int64),
    ):
        with pytest.raises(BadTensor, match="expected"):
            span.forward(hidden, [Segment(row, 0, 3)], cache)
    for hidden in (torch.zeros(3, 64), torch.zeros(1, 0, 64), torch.zeros(1, 3, 63)):
        with pytest.raises(BadTensor):
            span.forward_stateless(hidden)
    with pytest.raises(WrongSpan, match="blocks 0:3 are not here; expected part of 1:3"):
        span.forward(torch.zeros(3, 64), [Segment(row, 0, 3)], cache, start=0)
    assert cache.length(row) == 0


@pytest.mark.parametrize("ids", [[260], [-1], [[1, 2]]])
def test_token_ids_outside_the_vocabulary(ids: list[Any], tmp_path: Path) -> None:
    edges = load_edges(Checkpoint.open(tiny_llama(tmp_path)))
    with pytest.raises(InvalidArgument, match="0 to 259"):
        edges.embed(ids)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_a_quantized_head(quant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama(tmp_path))
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    exact = load_edges(checkpoint).head(hidden)
    made = load_edges(checkpoint, quant=quant)
    assert float((made.head(hidden) - exact).norm() / exact.norm()) < (0.01 if quant == "int8" else 0.12)
    assert made.nbytes < load_edges(checkpoint).nbytes / 2
