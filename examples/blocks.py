"""Hidden states in the middle of a model: python examples/blocks.py MODEL ADDRESS. Without ADDRESS, all here.

Prints how much each third of the blocks changes the states, and what comes out at the end.
"""

import sys

import torch

import petalite

PROMPT = "The capital of France is"

with petalite.load(sys.argv[1], peers=sys.argv[2:3] or None) as model:
    ids = torch.tensor([model.encode(PROMPT)])
    hidden = model.embed(ids)
    third = len(model.blocks) // 3
    for start in range(0, 3 * third, third):
        part = model.blocks[start : start + third]  # a torch module; its weights are elsewhere
        before, hidden = hidden, part(hidden)
        change = float((hidden - before).norm() / before.norm())
        print(f"blocks {part.span}: {change:.1f} times what came in", file=sys.stderr)
    print(PROMPT + model.tokenizer.decode([int(model.head(hidden)[0, -1].argmax())]))
