"""Text from a swarm: python examples/generate.py MODEL ADDRESS [PROMPT]. Without ADDRESS, all in this
process.
"""

import sys

import petalite

model_path, *rest = sys.argv[1:]
peers = rest[:1] or None
prompt = rest[1] if len(rest) > 1 else "A cat sat on"

with petalite.load(model_path, peers=peers) as model:
    print(prompt, end="")
    for text in model.stream(prompt, max_new_tokens=32):
        print(text, end="", flush=True)
    print()
