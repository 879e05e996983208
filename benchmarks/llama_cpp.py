"""llama.cpp on SmolLM2's weights, where `xllamacpp` is installed (extra `bench`): what decode and prefill
run beside.

Its files are written once into the cache folder from the checkpoint that petalite runs, in the type asked
for.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from petalite.node.smollm2 import _gguf_file, cache_folder

N_CONTEXT = 1024


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


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


class LlamaCpp:
    """One loaded file. Keep one at a time: its threads spin."""

    def __init__(self, kind: str, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(gguf_file(kind))
        params.n_ctx, params.n_batch, params.n_ubatch = N_CONTEXT, 512, 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_parallel, params.warmup, params.verbosity = 1, True, -1
        self._server = xllamacpp.Server(params)

    def rates(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        """Tokens/s of prefill and of decode, by its own clock."""
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
