"""What tests of several rooms share: a real model, and what transformers says it says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from petalite.model.checkpoint import Checkpoint
from petalite.model.tokenizer import load_tokenizer
from petalite.node.smollm2 import smollm2_folder

# Tests share the cores with the processes they start; two threads that spin for one core take far longer.
torch.set_num_threads(1)

# Triton's interpreter runs kernels where there is no GPU; it has to be asked for before anybody imports
# triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests of Ctrl-C would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROMPT_TOKENS = (5, 9, 17, 33, 64, 65, 120, 257, 400, 600)
NEW_TOKENS = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that of processes that share the files none is left alone with it."""
    items.sort(key=lambda item: item.path.name != "test_main_job.py")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a model folder, in the cache that the demo uses too."""
    return smollm2_folder()


@pytest.fixture(scope="session")
def smollm2_greedy(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[tuple[list[int], list[int]]]:
    """Prompts of 5 to 600 tokens, each with the ids that transformers adds to it, greedily, in float32."""
    if not hasattr(request.config, "workerinput"):
        return _greedy_by_transformers(smollm2)
    # Worked out by the first of the processes that share the tests; the folder above theirs is the run's own.
    shared = tmp_path_factory.getbasetemp().parent / "smollm2_greedy.json"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            shared.write_text(json.dumps(_greedy_by_transformers(smollm2)))
    return [(prompt, expected) for prompt, expected in json.loads(shared.read_text())]


def _greedy_by_transformers(folder: Path) -> list[tuple[list[int], list[int]]]:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (Path(__file__).parents[1] / "LICENSE").read_text() * 4
    tokens = load_tokenizer(Checkpoint.open(folder)).encode(text)
    pairs = []
    for index, length in enumerate(PROMPT_TOKENS):
        prompt = tokens[7 * index : 7 * index + length]
        with torch.inference_mode():
            output = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        pairs.append((prompt, output[0, length:].tolist()))
    return pairs
