"""In the style of the Grimms: a LoRA on blocks that are in three other processes: python examples/lora.py

A and B and their optimizer are here; servers get each version once and return gradients. See data/README.md
for the tales; the last two are held out. Needs the extra `plot`; takes some minutes on two cores.
"""

import torch
from common import DATA, draw, swarm_of_three, with_bar
from torch.nn.functional import cross_entropy

from petalite.tuning import Lora, Tuned, save_version

RANK, BATCH, LENGTH, STEPS, RATE = 8, 8, 64, 24, 4e-3
PROMPT = "In the middle of the wood there stood"


def rows(model, tales):
    """(N, LENGTH + 1): what is told, cut into rows."""
    ids = torch.tensor([token for tale in tales for token in model.encode(tale)])
    return ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


def loss_of(module, ids):
    return cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def measured(module, ids):
    return sum(loss_of(module, part).item() * len(part) for part in ids.split(BATCH)) / len(ids)


torch.manual_seed(0)
tales = (DATA / "grimm.txt").read_text().split("# ")[1:]
losses = []
with swarm_of_three() as model:
    train, held_out = rows(model, tales[:-2]), rows(model, tales[-2:])
    before = measured(Tuned(model), held_out)
    print(f"loss on two other tales, untuned: {before:.3f}")
    lora = Lora(model, RANK, alpha=16, targets=("query", "value", "output"))
    optimizer = torch.optim.AdamW(lora.parameters(), lr=RATE)
    order = torch.cat([torch.randperm(len(train)) for _ in range(3)])[: STEPS * BATCH].split(BATCH)
    for chosen in with_bar(order, "tuning the LoRA", STEPS, losses):
        optimizer.zero_grad()
        loss = loss_of(lora, train[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    after = measured(lora, held_out)
    print(f"loss on two other tales, tuned: {after:.3f}")
    for name, text in (
        ("untuned", model.generate(PROMPT, max_new_tokens=40).text),
        ("tuned", lora.generate(PROMPT, max_new_tokens=40).text),
    ):
        print(f"{name}: {PROMPT}{text}")
    version = save_version("versions", lora, metrics={"loss": after, "untuned loss": before})
    print(f"{version.path}, {version.nbytes >> 10} KiB")
draw("lora.png", "LoRA on the Grimms' tales", losses, {"two other tales, untuned": before, "tuned": after})
