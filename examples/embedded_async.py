"""petalite inside an asyncio app: python examples/embedded_async.py MODEL ADDRESS. Two questions at once."""

import asyncio
import sys

import petalite

QUESTIONS = ("What is the capital of France?", "Name a prime number.")


async def ask(model, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return "".join([text async for text in model.stream(messages, max_new_tokens=24)])


async def main(path: str, address: str) -> None:
    async with petalite.Swarm(peers=[address]) as swarm:
        model = await swarm.model(path)
        answers = await asyncio.gather(*(ask(model, question) for question in QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer}")


asyncio.run(main(*sys.argv[1:3]))
