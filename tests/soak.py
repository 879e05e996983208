"""`make soak`: six servers, twelve clients that come and go, a random SIGKILL every 20 seconds, for ten
minutes.

Every text that is finished equals the single process's, cancelled ones free what they held, and at the end
neither the tasks and memory of the clients' process nor the memory of the server that was never killed have
grown.

    python -m tests.soak [--minutes 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

import petalite
from petalite.client.model import AsyncDistributedModel
from petalite.client.settings import Routing
from petalite.net.loop import new_event_loop
from petalite.net.multiaddr import Multiaddr
from petalite.node.processes import NodeProcess, bootstrap_node, serve_node
from tests.helpers.checkpoints import tiny_llama

# Each block has two holders beside the one that is never killed, which most clients do without: alone it is
# the fastest chain there is, and nothing that happens to the others would happen to anybody.
SPANS = ("0:3", "3:6", "0:2", "2:4", "4:6", "0:6")
CLIENTS = 12
WITHOUT_THE_LAST = 9  # of them
KILL_EVERY_S = 20.0
NEW_TOKENS = 48
PROMPTS = [list(range(start, start + 20 + 7 * start)) for start in range(1, 9)]
GROWTH_MB = 48  # of memory, from a warm start: an allocator's slack, not a leak in proportion to the run


@dataclass
class Tally:
    finished: int = 0
    cancelled: int = 0
    kills: int = 0
    recoveries: int = 0
    wrong: list[str] = field(default_factory=list)


async def soak(seconds: float, seed: int) -> int:
    chance = random.Random(seed)
    tally = Tally()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = str(tiny_llama(Path(folder) / "tiny", num_hidden_layers=6))
        expected = await asyncio.to_thread(_expected, model)
        bootstrap = stack.enter_context(bootstrap_node())
        address = await asyncio.to_thread(lambda: bootstrap.address)
        servers = [serve_node(model, span, [address]) for span in SPANS]
        stack.callback(_stop, servers)
        for server in servers:
            await asyncio.to_thread(lambda server=server: server.address)
        swarm = await stack.enter_async_context(petalite.Swarm([address]))
        anywhere = await swarm.model(model)
        elsewhere = await swarm.model(model, routing=Routing(blocked=frozenset([servers[-1].peer_id])))
        warm = await _rest(servers[-1])
        async with asyncio.timeout(seconds + 120):
            async with asyncio.TaskGroup() as group:
                until_s = asyncio.get_running_loop().time() + seconds
                group.create_task(_kill(model, address, servers, chance, until_s, tally))
                for number in range(CLIENTS):
                    opened = elsewhere if number < WITHOUT_THE_LAST else anywhere
                    group.create_task(
                        _client(opened, expected, random.Random(chance.random()), until_s, tally)
                    )
                group.create_task(_report(until_s, tally))
        end = await _rest(servers[-1])
    return _judge(tally, warm, end)


def _stop(servers: list[NodeProcess]) -> None:
    """Those that run now, whichever began with us."""
    for server in servers:
        server.stop()


def _expected(model: str) -> list[list[int]]:
    with petalite.load(model) as alone:
        return [alone.generate(prompt, max_new_tokens=NEW_TOKENS).token_ids for prompt in PROMPTS]


async def _client(
    model: AsyncDistributedModel,
    expected: list[list[int]],
    chance: random.Random,
    until_s: float,
    tally: Tally,
) -> None:
    """Texts one after the other, some cancelled on the way, with pauses."""
    loop = asyncio.get_running_loop()
    while loop.time() < until_s:
        index = chance.randrange(len(PROMPTS))
        task = asyncio.create_task(model.generate(PROMPTS[index], max_new_tokens=NEW_TOKENS))
        patience_s = chance.uniform(0.0, 2.0) if chance.random() < 0.2 else None
        done, _ = await asyncio.wait([task], timeout=patience_s)
        if not done:
            task.cancel()
            await asyncio.wait([task])
            tally.cancelled += 1
        elif task.result().token_ids == expected[index]:
            tally.finished += 1
            tally.recoveries += len(task.result().trace.recoveries)
        else:
            tally.wrong.append(f"prompt {index}: {task.result().token_ids}")
        await asyncio.sleep(chance.uniform(0.0, 0.5))


async def _kill(
    model: str,
    address: Multiaddr,
    servers: list[NodeProcess],
    chance: random.Random,
    until_s: float,
    tally: Tally,
) -> None:
    """Any server but the last, which comes back when the next one goes."""
    loop = asyncio.get_running_loop()
    due_s = loop.time() + KILL_EVERY_S
    while due_s < until_s:
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        due_s += KILL_EVERY_S
        index = chance.randrange(len(servers) - 1)
        servers[index].kill()
        tally.kills += 1
        await asyncio.sleep(KILL_EVERY_S / 4)
        servers[index] = serve_node(model, SPANS[index], [address])
        await asyncio.to_thread(lambda index=index: servers[index].address)


async def _report(until_s: float, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    while loop.time() < until_s:
        await asyncio.sleep(min(30.0, max(0.0, until_s - loop.time())))
        print(
            f"{tally.finished} texts, {tally.recoveries} recoveries, {tally.kills} kills, "
            f"{tally.cancelled} cancelled, {len(tally.wrong)} wrong",
            flush=True,
        )


async def _rest(server: NodeProcess) -> tuple[int, float, float]:
    """Tasks and megabytes here, and megabytes of the server, once nothing is under way."""
    await asyncio.sleep(2.0)
    gc.collect()
    return len(asyncio.all_tasks()), _resident_mb("self"), _resident_mb(str(server.pid))


def _resident_mb(pid: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not tell a process's memory")


def _judge(tally: Tally, warm: tuple[int, float, float], end: tuple[int, float, float]) -> int:
    checks = {
        "every finished text equals the single process's": not tally.wrong and tally.finished > 0,
        f"kills hit sessions ({tally.recoveries} recoveries of {tally.kills} kills)": tally.recoveries > 0,
        f"no tasks are left behind ({warm[0]}, then {end[0]})": end[0] <= warm[0] + 2 * len(SPANS),
        f"the clients' memory ({warm[1]:.0f} MB, then {end[1]:.0f})": end[1] < warm[1] + GROWTH_MB,
        f"the server's memory ({warm[2]:.0f} MB, then {end[2]:.0f})": end[2] < warm[2] + GROWTH_MB,
    }
    for what, held in checks.items():
        print("held  " if held else "FAILED", what)
    for text in tally.wrong[:5]:
        print(text)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        sys.exit(runner.run(soak(arguments.minutes * 60, arguments.seed)))
