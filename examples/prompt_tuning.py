"""Is it praise? Trained tokens before every film review: python examples/prompt_tuning.py

SmolLM2's blocks are in three other processes; the prompt and its optimizer are here. The answer is whether
the model finds " good" or " bad" likelier next. See data/README.md for the sentences; the last 120 are held
out. Needs the extra `plot`; takes some minutes on two cores.
"""

import torch
from common import DATA, draw, swarm_of_three, with_bar
from torch.nn.functional import cross_entropy

from petalite.tuning import PromptTuning, Tuned, save_version

TEMPLATE = "Review: {}\nThe film is"
ANSWERS = (" bad", " good")
N_TOKENS, BATCH, STEPS, HELD_OUT, RATE = 8, 16, 30, 120, 0.03
LONGEST = 100  # characters of a sentence; longer ones only take longer


def batches(model, lines, size):
    """(ids (B, T) padded on the right, lengths (B,), labels (B,)) of the lines, in their order."""
    for start in range(0, len(lines), size):
        labels, texts = zip(*(line.split("\t") for line in lines[start : start + size]), strict=True)
        encoded = [torch.tensor(model.encode(TEMPLATE.format(text))) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
        yield ids, torch.tensor([len(one) for one in encoded]), torch.tensor([int(one) for one in labels])


def scores(module, answers, ids, lengths):
    """(B, 2): how likely each answer is next."""
    last = module.hidden(ids)[torch.arange(len(ids)), lengths - 1]
    return module.model.head(last[:, None])[:, 0, answers]


@torch.no_grad()
def accuracy(module, answers, lines):
    right = 0
    for ids, lengths, labels in batches(module.model, lines, 40):
        right += int((scores(module, answers, ids, lengths).argmax(-1) == labels).sum())
    return right / len(lines)


torch.manual_seed(0)
lines = [line for line in (DATA / "reviews.tsv").read_text().splitlines() if len(line) <= LONGEST]
train, held_out = lines[:-HELD_OUT], lines[-HELD_OUT:]
losses = []
with swarm_of_three() as model:
    answers = [model.encode(answer)[0] for answer in ANSWERS]
    before = accuracy(Tuned(model), answers, held_out)
    print(f"{HELD_OUT} held-out sentences, untuned: {before:.1%} right")
    tuned = PromptTuning(model, N_TOKENS, text="Is this film good or bad?")
    optimizer = torch.optim.Adam(tuned.parameters(), lr=RATE)
    shuffled = [train[i] for i in torch.randperm(len(train))[: STEPS * BATCH]]
    for ids, lengths, labels in with_bar(batches(model, shuffled, BATCH), "tuning the prompt", STEPS, losses):
        optimizer.zero_grad()
        loss = cross_entropy(scores(tuned, answers, ids, lengths), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    after = accuracy(tuned, answers, held_out)
    print(f"{HELD_OUT} held-out sentences, tuned: {after:.1%} right")
    version = save_version("versions", tuned, metrics={"accuracy": after, "untuned accuracy": before})
    print(f"{version.path}, {version.nbytes >> 10} KiB")
draw("prompt_tuning.png", f"Held-out sentences: {before:.1%} right before, {after:.1%} after", losses, {})
