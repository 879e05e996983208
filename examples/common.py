"""What the training examples share: a swarm of three servers on this machine, a progress bar, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import petalite
from petalite.node.processes import serve_node
from petalite.node.smollm2 import smollm2_folder

T = TypeVar("T")
DATA = Path(__file__).parent / "data"


@contextmanager
def swarm_of_three(
    spans: tuple[str, ...] = ("0:10", "10:20", "20:30"),
) -> Iterator[petalite.DistributedModel]:
    """SmolLM2-135M-Instruct over three processes, which are stopped in the end."""
    folder = str(smollm2_folder())
    with serve_node(folder, spans[0], []) as first:
        peers = [first.address]
        with serve_node(folder, spans[1], peers) as second, serve_node(folder, spans[2], peers) as third:
            assert second.address and third.address  # they are up
            with petalite.load(folder, peers=peers) as model:
                yield model


def with_bar(steps: Iterable[T], what: str, total: int, losses: list[float]) -> Iterator[T]:
    """The steps, behind a bar that shows the latest loss."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bars:
        task = bars.add_task(what, total=total)
        for step in steps:
            yield step
            bars.update(task, advance=1, description=f"{what}, loss {losses[-1]:.3f}")


def draw(path: str, title: str, losses: list[float], marks: dict[str, float]) -> None:
    """The loss of every step, its mean over ten, and horizontal lines at what was measured on other text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    windows = [losses[max(0, last - 9) : last + 1] for last in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, alpha=0.3, label="a step")
    axes.plot(range(1, len(losses) + 1), smooth, label="mean of ten")
    for index, (name, value) in enumerate(marks.items()):
        axes.axhline(value, color=f"C{index + 2}", linestyle="--", label=f"{name}: {value:.3f}")
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.legend(loc="lower left")  # a falling curve leaves that corner free
    figure.savefig(path, dpi=120)
