"""Decode steps as graphs beside the same steps in torch: on a GPU, and by Triton's interpreter and a recorder
that bakes in what a CUDA graph does (tests/helpers/recording.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from petalite.errors import SessionLimit
from petalite.kernels import linear, triton_attention
from petalite.kernels.quantized import FORMATS, NONE
from petalite.model import graphs
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import BlockSpan, load_span
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.recording import Refusing, Remembering

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy

# Small, for the interpreter's sake.
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "two key heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "smollm3": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "pad_token_id": 0,
        "no_rope_layers": [1, 0],
    },
    "bloom": {
        **dict.fromkeys(("hidden_size", "n_embed"), 48),
        **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), 3),
        "model_type": "bloom",
        "n_layer": 2,
    },
}


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Without a GPU, with the linears that one has, and few parts and scratch rows."""
    if (request.param == "gpu") != torch.cuda.is_available():
        pytest.skip("this needs a GPU" if request.param == "gpu" else "kernels are compiled here")
    if request.param == "gpu":
        return torch.device("cuda")
    for quant in (NONE, *FORMATS):
        name = "dense" if quant == NONE else "triton"
        row = next(row for row in linear.KERNELS[quant] if row.name == name)
        there = linear.LinearKernel(name, row.make, lambda device, dtype: True)
        monkeypatch.setitem(linear.KERNELS, quant, (there,))
    monkeypatch.setattr(triton_attention, "PARTS", 2)
    monkeypatch.setattr(graphs, "CHECKED_LENGTHS", (0, 9))
    linear.pick.cache_clear()
    request.addfinalizer(linear.pick.cache_clear)
    return torch.device("cpu")


@dataclass
class Twins:
    """The same blocks twice, with graphs and without, and what both were asked."""

    span: BlockSpan
    plain: BlockSpan
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caches = self.span.new_cache(), self.plain.new_cache()

    def open(self, *blocks: int) -> int:
        numbers = {cache.open_row(64, *blocks) for cache in self.caches}
        assert len(numbers) == 1
        return numbers.pop()

    def drop(self, row: int) -> None:
        for cache in self.caches:
            cache.drop(row)

    def step(self, *segments: tuple[int, int, int], blocks: Sequence[int] = ()) -> None:
        parts = [Segment(*segment) for segment in segments]
        hidden = torch.randn(sum(part.n_tokens for part in parts), self.span.config.hidden_size)
        part = dict(zip(("start", "end"), blocks, strict=False))
        spans = zip((self.span, self.plain), self.caches, strict=True)
        found, expected = (span.forward(hidden, parts, cache, **part) for span, cache in spans)
        self.made.append((found, expected))

    def check(self, most: float) -> None:
        """Of every step, long after it: nobody wrote into what it returned."""
        for found, expected in self.made:
            assert found.dtype == expected.dtype and found.shape == expected.shape
            off = (found - expected).abs().amax(1) / expected.abs().amax(1)
            assert float(off.max()) < most


def twins(
    folder: Path,
    device: torch.device,
    recorder: Any = None,
    dtype: torch.dtype = torch.float32,
    quant: str = NONE,
    **config: Any,
) -> tuple[Twins, Any]:
    checkpoint = Checkpoint.open(tiny_llama(folder, **(SMALL | config)))
    end = checkpoint.config.n_blocks
    span, plain = (
        load_span(checkpoint, 0, end, dtype=dtype, device=device, quant=quant, cache=folder / "cache")
        for _ in range(2)
    )
    assert (span.graphs is not None) == (device.type == "cuda")
    if recorder is not None or device.type == "cpu":
        recorder = recorder or Remembering()
        span.graphs = span._decode_graphs(recorder)
    plain.graphs = None
    torch.manual_seed(0)
    return Twins(span, plain), recorder


def generate(both: Twins) -> None:
    """Rows that come, grow, are cut, go, and are of parts of the span."""
    first, second = both.open(), both.open()
    both.step((first, 0, 20))
    both.step((first, 20, 1))
    both.step((second, 0, 2), (first, 21, 1))  # three tokens are padded to four
    part = both.open(1, 2)
    both.step((part, 0, 3), blocks=(1, 2))
    both.drop(second)
    third = both.open()
    both.step((third, 0, 1), (first, 19, 1))
    both.step((first, 20, 1))
    both.step((part, 3, 1), blocks=(1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_torch(family: str, device: torch.device, tmp_path: Path) -> None:
    both, _ = twins(tmp_path, device, **FAMILIES[family])
    generate(both)
    both.check(1e-5 if device.type == "cpu" else 1e-4)
    assert (
        both.span.graphs is not None and len(both.span.graphs._graphs) == 2 * 3
    )  # blocks, 1, 2 and 4 tokens


@pytest.mark.parametrize(
    ("dtype", "quant"),
    [
        (torch.bfloat16, "none"),
        (torch.float16, "none"),
        (torch.float32, "int8"),
        (torch.float16, "nf4"),
        pytest.param(torch.bfloat16, "int8", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, "nf4", marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_in_every_dtype_and_format(
    dtype: torch.dtype, quant: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(graphs, "CHECKED_LENGTHS", (0, 2))
    both, _ = twins(tmp_path, device, dtype=dtype, quant=quant, num_hidden_layers=1)
    row = both.open()
    for position in range(4):
        both.step((row, position, 1))
    both.check(graphs.disagreement(dtype, quant))
    assert both.span.graphs is not None and len(both.span.graphs._graphs) == 1


def test_there_are_few_and_each_is_recorded_once(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer steps run without, as do those with a LoRA."""
    if device.type == "cpu":
        monkeypatch.setattr(triton_attention, "PARTS", 1)
    monkeypatch.setattr(graphs, "CHECKED_LENGTHS", (0,))
    both, recorder = twins(tmp_path, device, num_hidden_layers=1, num_attention_heads=1)
    assert both.span.prepare() and not both.plain.prepare()
    row, *others = (both.open() for _ in range(17))
    for n_tokens in (16, 1, 9, 2, 5, 3, 4, 17):
        both.step((row, 0, n_tokens))
    both.step((row, 5, 1), *((other, 0, 1) for other in others))
    both.step((row, 6, 2), *((other, 1, 1) for other in others))  # no longer one of each
    both.check(1e-5 if device.type == "cpu" else 1e-4)
    made = both.span.graphs
    assert made is not None and sorted(made._graphs) == [(0, shape) for shape in graphs.SHAPES]
    if recorder is not None:
        checks = 2 * len(graphs.SHAPES)  # of two steps each
        assert recorder.recorded == len(graphs.SHAPES) and recorder.replayed == checks + 7 + 1
    made._graphs.clear()
    cache = both.span.new_cache()
    segments = [Segment(cache.open_row(4), 0, 1)]
    both.span.forward(torch.randn(1, 64), segments, cache, adapted=both.span._blocks)
    assert not made._graphs


class FakeCuda:
    """What `CudaRecorder` asks of CUDA, written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        for name, made in (
            ("Stream", lambda device: self),
            ("current_stream", lambda device: FakeStream(self.asked)),
            ("stream", self.entered),
            ("graph_pool_handle", lambda: "pool"),
            ("CUDAGraph", lambda: self),
        ):
            monkeypatch.setattr(torch.cuda, name, made)

    @contextmanager
    def entered(self, stream: object) -> Iterator[None]:
        assert stream is self
        self.asked.append("on its stream")
        yield
        self.asked.append("off its stream")

    def wait_stream(self, other: object) -> None:
        self.asked.append("waits")

    def capture_begin(self, **options: str) -> None:
        assert options == {"pool": "pool", "capture_error_mode": "thread_local"}
        self.asked.append("begins")

    def capture_end(self) -> None:
        self.asked.append("ends")

    def replay(self) -> None: ...


@dataclass
class FakeStream:
    asked: list[str]

    def wait_stream(self, other: object) -> None:
        assert isinstance(other, FakeCuda)
        self.asked.append("is waited for")


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is done once before it is captured; a capture that fails is ended."""
    cuda = FakeCuda(monkeypatch)
    recorder = graphs.CudaRecorder(torch.device("cuda"))
    assert recorder.record(lambda: cuda.asked.append("works")) == cuda.replay
    around = ["waits", "on its stream"], ["off its stream", "is waited for"]
    captured = ["works", "begins", "works", "ends"]
    assert cuda.asked == [*around[0], *captured, *around[1]]
    cuda.asked.clear()

    def fails() -> None:
        cuda.asked.append("works")
        if "begins" in cuda.asked:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(fails)
    assert cuda.asked[:-1] == [*around[0], *captured] and cuda.asked[-1] == "is waited for"


def test_a_step_that_does_not_fit_records_nothing(device: torch.device, tmp_path: Path) -> None:
    both, recorder = twins(tmp_path, device, Remembering())
    with pytest.raises(SessionLimit):
        both.step((both.open(), 0, 65))
    assert recorder.recorded == 0


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Refusing(), "CUDA out of memory. Tried to allocate 2.00 MiB."),
        (Remembering(forgotten="_append"), "1 tokens through block 0 are off by"),
        (Remembering(forgotten="_merge"), "1 tokens through block 0 are off by"),
        (Remembering(forgotten="copy_"), "1 tokens through block 0 are off by"),
    ],
    ids=["cannot be recorded", "appends nothing", "attends to nothing", "returns nothing"],
)
def test_what_cannot_be_trusted_is_never_used(
    recorder: Any, reason: str, device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The span goes on without graphs, to the bit, and says so once."""
    if device.type == "cuda":
        pytest.skip("CUDA's recorder forgets nothing")
    both, _ = twins(tmp_path, device, recorder)
    with caplog.at_level(logging.WARNING, logger="petalite.model.graphs"):
        generate(both)
    assert all(torch.equal(*pair) for pair in both.made)
    (message,) = caplog.messages
    assert message.startswith(f"decode steps on cpu run without graphs, more slowly: {reason}")
    assert "more lines" not in message


def test_the_first_graph_that_cannot_be_made_takes_all_others_with_it(
    device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a session, whose steps go on."""
    if device.type == "cuda":
        pytest.skip("CUDA's recorder refuses nothing")
    monkeypatch.setattr(triton_attention, "PARTS", 1)
    monkeypatch.setattr(graphs, "CHECKED_LENGTHS", (0,))
    both, recorder = twins(tmp_path, device, Refusing(most=1), num_hidden_layers=1, num_attention_heads=1)
    row, made = both.open(), both.span.graphs
    both.step((row, 0, 1))
    assert made is not None and len(made._graphs) == 1 and not caplog.messages
    both.step((row, 1, 2))
    both.step((row, 3, 1))
    both.check(1e-5)
    assert not made._graphs and recorder.recorded == 1 and len(caplog.messages) == 1
    assert not both.span.prepare()


def test_a_block_that_asks_for_values_cannot_be_recorded(
    device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Mixtral's, which is not even tried. CUDA's recorder recovers from work that fails half-way."""
    config = {
        "model_type": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    checkpoint = Checkpoint.open(tiny_llama(tmp_path, **(SMALL | config)))
    span = load_span(checkpoint, 0, 2, device=device)
    assert span.graphs is None and not any(block.is_static for block in span._blocks)
    both = Twins(span, load_span(checkpoint, 0, 2, device=device))
    span.graphs = span._decode_graphs(Remembering() if device.type == "cpu" else graphs.CudaRecorder(device))
    generate(both)
    both.check(1e-6)
    assert "captur" in caplog.text and not span.graphs._graphs


@pytest.mark.gpu
def test_others_may_use_the_device_meanwhile(device: torch.device, tmp_path: Path) -> None:
    """An event loop that copies what it sends, while graphs are recorded."""
    if device.type == "cpu":
        pytest.skip("there is no device")
    over, copied = threading.Event(), []

    def copy() -> None:
        while not over.is_set():
            copied.append(torch.ones(1 << 16, device=device).mul(2).cpu())

    other = threading.Thread(target=copy)
    other.start()
    try:
        both, _ = twins(tmp_path, device)
        assert both.span.prepare()
        generate(both)
    finally:
        over.set()
        other.join()
    both.check(1e-4)
    assert copied and all(bool((each == 2).all()) for each in copied)


def test_where_there_are_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALITE_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    blocks = load_span(Checkpoint.open(tiny_llama(tmp_path, **SMALL)), 0, 2)._blocks
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert graphs.works_for(blocks, cuda, torch.bfloat16) and not graphs.works_for(
        blocks, cpu, torch.bfloat16
    )
    monkeypatch.setenv("PETALITE_KERNELS", "torch")
    assert not graphs.works_for(blocks, cuda, torch.bfloat16)
