"""llama.cpp on SmolLM2's weights: what decode and prefill run beside. `llama-cpp-python`, which pip builds
for the machine, where it is installed; else `xllamacpp`, which comes built for AVX2 (extra `bench`).

Its files are written once into the cache folder from the checkpoint that petalite runs, in the type asked
for.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Protocol

from petalite.node.smollm2 import _gguf_file, cache_folder

N_CONTEXT = 1024


def build() -> str | None:
    """The package whose llama.cpp runs; None if there is none."""
    return next((name for name in ("llama_cpp", "xllamacpp") if importlib.util.find_spec(name)), None)


def gguf_file(kind: str) -> Path:
    """SmolLM2 as `Q8_0`, `BF16` or `Q4_1` (as it came)."""
    if kind == "Q4_1":
        return _gguf_file()
    path = cache_folder() / f"SmolLM2-135M-Instruct.{kind}.gguf"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            _convert(_gguf_file(), Path(folder) / "file", kind)
            (Path(folder) / "file").replace(path)
    return path


def _convert(source: Path, target: Path, kind: str) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if dense.ndim == 1:
            writer.add_tensor(tensor.name, dense)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(dense, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp(Protocol):
    """One loaded file. Keep one at a time: its threads spin."""

    def rates(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        """Tokens/s of prefill and of decode, by its own clock."""
        ...


def load(kind: str, threads: int) -> LlamaCpp:
    return _Native(kind, threads) if build() == "llama_cpp" else _Wheel(kind, threads)


class _Native:
    """By `llama-cpp-python`."""

    def __init__(self, kind: str, threads: int) -> None:
        import llama_cpp

        self._model = llama_cpp.Llama(
            str(gguf_file(kind)),
            n_ctx=N_CONTEXT,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            no_perf=False,
            verbose=False,
        )
        self._model.eval([1, 2])  # warms up, as the other does by itself

    def rates(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        import llama_cpp

        context = self._model.ctx
        self._model.reset()
        llama_cpp.llama_perf_context_reset(context)
        for tokens in (prompt, *([5],) * new_tokens):
            self._model.eval(tokens)
            llama_cpp.llama_synchronize(context)  # which is when its clock takes note
        taken = llama_cpp.llama_perf_context(context)
        return 1e3 * taken.n_p_eval / taken.t_p_eval_ms, 1e3 * taken.n_eval / max(taken.t_eval_ms, 1e-3)


class _Wheel:
    """By `xllamacpp`."""

    def __init__(self, kind: str, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(gguf_file(kind))
        params.n_ctx, params.n_batch, params.n_ubatch = N_CONTEXT, 512, 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_parallel, params.warmup, params.verbosity = 1, True, -1
        self._server = xllamacpp.Server(params)

    def rates(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        answer: dict[str, Any] = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new_tokens,
                "temperature": 0.0,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        timings = answer["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]
