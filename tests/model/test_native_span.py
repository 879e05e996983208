"""One native call for a whole step, against the Python path, transformers, and itself cut up otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from petalite.errors import InvalidArgument
from petalite.kernels import native
from petalite.kernels.native.span import NativeSegment, NativeSpan, native_addresses
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import BlockSpan, load_span
from tests.helpers.checkpoints import tiny_llama
from tests.model.test_span import CHUNKINGS, CONFIGS, N_TOKENS, Loaded, close

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native kernels are built, or torch's are forced")
TABLES = LIBRARY.instruction_sets() if LIBRARY is not None else {}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(folder: Path, *, dtype: torch.dtype = torch.float32, quant: str = "none") -> BlockSpan:
    checkpoint = Checkpoint.open(folder)
    return load_span(checkpoint, 0, checkpoint.config.n_blocks, dtype=dtype, quant=quant)


def in_python(span: BlockSpan) -> BlockSpan:
    """The same blocks and linears on the other path."""
    other = BlockSpan(span.config, 0, span._blocks, dtype=span.dtype, device=span.device)
    other._native = None
    return other


def noise(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def fed(span: BlockSpan, hidden: Tensor, chunks: Sequence[int]) -> Tensor:
    """What comes out when `hidden` goes in in chunks, in a row of its own."""
    cache = span.new_cache()
    row = cache.open_row(len(hidden))
    outputs = []
    for end, size in zip(itertools.accumulate(chunks), chunks, strict=True):
        outputs.append(span.forward(hidden[end - size : end], [Segment(row, end - size, size)], cache))
    return torch.cat(outputs)


# -- the same numbers --------------------------------------------------------------------------------------

NATIVE = [name for name in CONFIGS if name != "mixtral"]


@pytest.mark.parametrize("name", NATIVE)
def test_logits_equal_those_of_transformers_and_the_python_path(name: str, tmp_path: Path) -> None:
    loaded = Loaded(tiny_llama(tmp_path, **CONFIGS[name]))
    assert loaded.span._native is not None
    whole = loaded.logits([N_TOKENS])
    close(whole, loaded.expected)
    for chunks in CHUNKINGS.values():
        assert torch.equal(loaded.logits(chunks), whole)  # norms, heads and all: the same to the bit
    loaded.span = in_python(loaded.span)
    close(whole, loaded.logits([N_TOKENS]))


def test_mixtral_takes_the_python_path(tmp_path: Path) -> None:
    assert load(tiny_llama(tmp_path, **CONFIGS["mixtral"]))._native is None


def test_panels_that_gate_and_up_share_take_the_python_path(tmp_path: Path) -> None:
    assert load(tiny_llama(tmp_path, intermediate_size=90))._native is None


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["gqa", "bloom"])
def test_half_precision_is_nearer_to_float32_than_python_is(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Caches and what goes in and out are rounded, and nothing in between."""
    folder = tiny_llama(tmp_path, **CONFIGS[name])
    hidden = noise(N_TOKENS, 64).to(dtype)
    exact = fed(in_python(load(folder)), hidden.float(), [N_TOKENS])
    span = load(folder, dtype=dtype)
    ours, reference = (fed(path, hidden, [20, *[1] * 21]).float() for path in (span, in_python(span)))
    assert float((ours - exact).norm()) < 1.05 * float((reference - exact).norm())
    assert fed(span, hidden, [N_TOKENS]).dtype == dtype


# -- whatever the cut, the company and the machine ---------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "window across chunks of keys": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 270,
    },
    "bloom, odd heads": {"model_type": "bloom", "hidden_size": 60, "n_embed": 60},
}
LONG = 530  # more than two chunks of keys, and than one window of tokens


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 2, "n_layer": 2}
    return tiny_llama(tmp_path_factory.mktemp("case"), **sizes | CASES[request.param])


@pytest.fixture(params=["none", "int8", "nf4"])
def span(case: Path, request: pytest.FixtureRequest) -> BlockSpan:
    return load(case, quant=request.param)


def test_the_same_bits_however_cut(span: BlockSpan) -> None:
    hidden = noise(LONG, span.config.hidden_size)
    whole = fed(span, hidden, [LONG])
    reference = fed(in_python(span), hidden, [LONG])
    # Where a digit falls otherwise, which is rare, all later tokens of the row are of other keys: up to 3e-3.
    assert off(whole, reference) < (1e-6 if span.quant == "none" else 5e-3)
    for chunks in ([256, 256, 18], [300, 200, *[1] * 30], [1, 254, 2, 255, 1, 7, 10]):
        assert torch.equal(fed(span, hidden, chunks), whole)


def test_digits_fall_as_in_python(span: BlockSpan) -> None:
    """In short rows, most of which no digit falls otherwise in: there is nothing but float32's rounding."""
    rows = noise(160, span.config.hidden_size).split(4)
    python = in_python(span)
    found = torch.tensor([off(fed(span, row, [4]), fed(python, row, [4])) for row in rows])
    assert float(found.median()) < 5e-6 and float(found.max()) < 2e-2


def test_the_same_bits_with_any_number_of_threads(span: BlockSpan) -> None:
    hidden = noise(LONG, span.config.hidden_size)
    whole = fed(span, hidden, [LONG])
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(fed(span, hidden, [LONG]), whole)
            assert torch.equal(fed(span, hidden, [500, 1, 1, 4, 24]), whole)
    finally:
        torch.set_num_threads(1)


def test_the_same_bits_among_strangers(span: BlockSpan) -> None:
    """Rows at other positions, prefilling and decoding in the same steps; one of them has NaN."""
    size = span.config.hidden_size
    hidden = noise(320, size)
    whole = fed(span, hidden, [320])
    cache = span.new_cache()
    row, other, broken = (cache.open_row(400) for _ in range(3))
    lengths = {other: 0, broken: 0}
    outputs, at = [], 0
    for count, (before, after) in zip((270, 1, 1, 40, 8), itertools.cycle([(3, 40), (1, 1)]), strict=False):
        parts, segments = [], []
        for stranger, taken in ((other, before), (row, count), (broken, after)):
            position = at if stranger == row else lengths[stranger]
            segments.append(Segment(stranger, position, taken))
            if stranger == row:
                parts.append(hidden[at : at + count])
            else:
                parts.append(noise(taken, size, position + stranger))
                lengths[stranger] += taken
        parts[2][0] = torch.nan
        output = span.forward(torch.cat(parts), segments, cache)
        outputs.append(output[before : before + count])
        assert torch.isfinite(output[: before + count]).all()
        assert torch.isnan(output[before + count]).all()
        at += count
    assert torch.equal(torch.cat(outputs), whole)


def test_the_same_bits_from_every_instruction_set(case: Path) -> None:
    """Of what is summed in whole numbers; and the spans' own kernels everywhere."""
    assert LIBRARY is not None
    before = LIBRARY.instructions
    span = load(case, quant="int8")
    hidden = noise(300, span.config.hidden_size)
    results = []
    try:
        for name, runs in TABLES.items():
            if runs:
                LIBRARY.choose(name)
                results.append(fed(span, hidden, [280, *[1] * 20]))
    finally:
        LIBRARY.choose(before)
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_sizes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against the Python path."""
    group, kv_heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        head_dim, heads = data.draw(st.integers(1, 9)), group * kv_heads
        config = {"model_type": "bloom", "n_head": heads, "num_attention_heads": heads}
        config |= dict.fromkeys(("hidden_size", "n_embed"), heads * head_dim)
    else:
        window = data.draw(st.none() | st.integers(1, 80))
        config = {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": window,
            "hidden_size": data.draw(st.integers(1, 80)),
            "intermediate_size": 16 * data.draw(st.integers(1, 6)),
            "head_dim": 2 * data.draw(st.integers(1, 40)),
            "num_attention_heads": group * kv_heads,
            "num_key_value_heads": kv_heads,
        }
    dtype = data.draw(st.sampled_from(DTYPES))
    # The norm of a number or two makes much of what is nearly nothing, and in 16 bits is mostly rounding.
    assume(dtype == torch.float32 or config["hidden_size"] >= 8)
    folder = tiny_llama(tmp_path_factory.mktemp("any"), num_hidden_layers=1, n_layer=1, **config)
    span = load(folder, dtype=dtype)
    assert span._native is not None
    count = data.draw(st.integers(1, 150))
    chunks = data.draw(st.lists(st.integers(1, 60), max_size=4))
    hidden = noise(count + sum(chunks), span.config.hidden_size).to(dtype)
    ours, reference = (fed(path, hidden, [count, *chunks]).float() for path in (span, in_python(span)))
    rough = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    assert float((ours - reference).abs().max() / reference.abs().max()) < rough


# -- what is refused ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    span = load(tiny_llama(tmp_path))
    made = span._native
    assert made is not None
    rows = [torch.zeros(2, 1, 2, 8, 16) for _ in range(3)]
    good = NativeSegment(0, 2, 8, native_addresses(rows))
    rotations = span._rotations.rows(0, 8)
    hidden = torch.zeros(2, 64)
    assert made.step(hidden, 0, 3, [good], rotations).shape == (2, 64)
    short = NativeSegment(0, 2, 8, native_addresses(rows[:2]))
    for call in (
        (hidden[:1], 0, 3, [good], rotations),
        (hidden[:, :63], 0, 3, [good], rotations),
        (hidden.to("meta"), 0, 3, [good], rotations),
        (hidden, 0, 4, [good], rotations),
        (hidden, 2, 2, [good], rotations),
        (hidden, 0, 3, [], rotations),
        (hidden, 0, 3, [short], rotations),
        (hidden, 0, 3, [NativeSegment(7, 2, 8, good.addresses)], rotations),
        (hidden, 0, 3, [NativeSegment(-1, 2, 8, good.addresses)], rotations),
        (hidden, 0, 3, [good], rotations[:1]),
        (hidden, 0, 3, [good], rotations[:, :, :4]),
        (hidden, 0, 3, [good], rotations.to(torch.complex128)),
    ):
        with pytest.raises(InvalidArgument):
            made.step(*call)


def test_weights_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    assert LIBRARY is not None
    span = load(tiny_llama(tmp_path))
    assert span._native is not None
    shape, weights = span._native._shape, [block.native() for block in span._blocks]
    NativeSpan(LIBRARY, shape, weights, torch.float32)
    wrong = torch.zeros(63)
    for changed, block in (
        (replace(shape, hidden_size=63), weights[0]),
        (replace(shape, n_kv_heads=3), weights[0]),
        (shape, replace(weights[0], down=weights[0].output)),
        (shape, replace(weights[0], mlp_norm=replace(weights[0].mlp_norm, weight=wrong))),
        (shape, replace(weights[0], attention_norm=replace(weights[0].mlp_norm, bias=wrong))),
        (shape, replace(weights[0], head_norm=wrong)),
    ):
        with pytest.raises(InvalidArgument):
            NativeSpan(LIBRARY, changed, [block], torch.float32)
    with pytest.raises(InvalidArgument):
        NativeSpan(LIBRARY, shape, weights, torch.float64)
