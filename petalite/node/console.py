"""What the commands share: a console, a run until somebody says stop, progress bars."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from petalite.net.loop import new_event_loop

T = TypeVar("T")

out = Console(highlight=False, soft_wrap=True)
err = Console(highlight=False, soft_wrap=True, stderr=True)


def plain(text: object) -> str:
    """A stranger's text for a console: its brackets are no markup, and it moves no cursor."""
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in str(text)))


Report = Callable[[int, int], None]
"""`report(done, total)`: progress of something countable."""


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end on petalite's loop. Ctrl-C and SIGTERM cancel it, and the process exits with the shell's
    code for that; a command that has more to say to them waits in `until_stopped`."""

    async def stoppable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(stoppable())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)


async def until_stopped() -> str:
    """Wait for Ctrl-C or SIGTERM; the name of what came. Another one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if not stopped.done():
            stopped.set_result(number.name)
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return await stopped


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar on standard error for what may take more than a second; gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
