"""A talk that goes on: python examples/chat.py MODEL ADDRESS, then a line at a time."""

import sys

import petalite

with petalite.load(sys.argv[1], peers=sys.argv[2:3]) as model, model.session(max_length=2048) as session:
    messages = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        # The session keeps what the servers have computed: each turn costs only its own new tokens.
        pieces = []
        for text in model.stream(messages, max_new_tokens=64, session=session):
            print(text, end="", flush=True)
            pieces.append(text)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})
