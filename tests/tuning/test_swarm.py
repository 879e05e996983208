"""Training over real processes: servers killed with SIGKILL in the middle of forward and of backward, a
LoRA on the wire, and text by it from a ring of servers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

import petalite
from petalite.client.sync import DistributedModel
from petalite.node.processes import NodeProcess, serve_node
from petalite.tuning import Lora, PromptTuning

SPANS = ("0:2", "2:4", "4:6", "2:4")  # the second and the last can stand in for each other
IDS = torch.randint(0, 256, (24, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def swarm(folder: Path) -> Iterator[tuple[DistributedModel, list[NodeProcess]]]:
    with ExitStack() as stack:
        nodes = [stack.enter_context(serve_node(str(folder), SPANS[0], []))]
        peers = [nodes[0].address]
        nodes += [stack.enter_context(serve_node(str(folder), span, peers)) for span in SPANS[1:]]
        assert all(node.address for node in nodes)
        training = petalite.TrainingSettings(part_tokens=128)
        yield stack.enter_context(petalite.load(str(folder), peers=peers, training=training)), nodes


def lora_of(model: DistributedModel) -> Lora:
    lora = Lora(model, 4, targets=("query", "down"))
    with torch.no_grad():
        for one in lora.parameters():
            one.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return lora


def gradients(lora: Lora, before_backward: threading.Timer | None = None) -> list[Tensor]:
    lora.zero_grad()
    loss = lora(IDS).logsumexp(-1).mean()
    if before_backward is not None:
        before_backward.start()
    loss.backward()
    return [one.grad.clone() for one in lora.parameters() if one.grad is not None]


@pytest.mark.slow
def test_kills_change_no_gradient_and_a_lora_generates(
    swarm: tuple[DistributedModel, list[NodeProcess]], folder: Path
) -> None:
    model, nodes = swarm
    with petalite.load(str(folder)) as alone:
        reference = lora_of(alone)
        expected, text = gradients(reference), reference.generate([1, 2, 3], max_new_tokens=8)
        tuned = PromptTuning(alone, 4)
        prompted = tuned.generate([1, 2, 3], max_new_tokens=8)
    lora = lora_of(model)
    assert model.generate([1, 2, 3], max_new_tokens=8, prefix=tuned.prompt).token_ids == prompted.token_ids
    assert lora.generate([1, 2, 3], max_new_tokens=8).token_ids == text.token_ids

    def check(found: list[Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-5

    check(gradients(lora))
    assert not model.passes.replaced
    killer = threading.Timer(0.02, nodes[1].kill)
    check(gradients(lora, killer))  # somewhere in backward
    killer.join()
    with serve_node(str(folder), "2:4", [nodes[0].address]) as other:
        assert other.address
        killer = threading.Timer(0.02, nodes[3].kill)
        killer.start()
        check(gradients(lora))  # somewhere in forward; the replacement is found in the DHT
        killer.join()
        check(gradients(lora))
        lost = {one.hop.peer for one in model.passes.replaced}
        assert lost == {nodes[1].peer_id, nodes[3].peer_id}
        assert lora.generate([1, 2, 3], max_new_tokens=8).token_ids == text.token_ids
