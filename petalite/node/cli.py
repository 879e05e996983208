"""The commands and their options. Each builds settings and hands over to a module that does the work.

Nothing heavy is imported until a command needs it: `--help` and `bootstrap` load no torch.
"""

from __future__ import annotations

import errno
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from petalite.errors import PetaliteError
from petalite.node.grouping import grouped
from petalite.node.options import (
    BOOTSTRAP_LISTEN,
    SERVE_LISTEN,
    Blocks,
    Choosing,
    Compute,
    Joining,
    Listening,
    Name,
    Room,
    Tuning,
    Way,
)

app = typer.Typer(
    help="Run large language models together: serve a few blocks of one, or use the swarm that serves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model folder (config.json, safetensors, tokenizer.json) or a hub repo id."
    ),
]


ServedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a hub repo id, or the id of a model that the swarm serves, NAME@DIGEST as "
        "`status` shows it: its weights then come from servers that hold them, checked against the id.",
    ),
]


@app.command()
@grouped
def serve(
    model: ServedModel,
    node: Listening,
    compute: Compute,
    room: Room,
    tuning: Tuning,
    blocks: Annotated[
        str,
        typer.Option(
            metavar="START:END",
            help="Blocks to serve; or auto: as many as fit, where the swarm needs them, and others when it "
            "needs those more.",
        ),
    ] = "auto",
    name: Name = None,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Be the first node of a new swarm.")] = False,
) -> None:
    """Serve blocks of MODEL to a swarm until Ctrl-C or SIGTERM."""
    from petalite.node.serve import run
    from petalite.server.server import ServerSettings
    from petalite.server.sessions import SessionSettings
    from petalite.server.training_memory import TrainingSettings
    from petalite.swarm.spans import Span

    settings = ServerSettings(
        blocks=None if blocks == "auto" else Span.parse(blocks),
        name=name,
        compute=compute.settings(),
        memory=room.memory_settings(),
        sessions=SessionSettings(most=room.max_sessions),
        training=TrainingSettings(share=tuning.training_share),
        adapters=tuple(tuning.adapter or ()),
    )
    run(model, settings, node.listening(SERVE_LISTEN, new_swarm=new_swarm))


@app.command()
@grouped
def bootstrap(node: Listening) -> None:
    """Run a node that others join through. It holds no blocks and needs little of anything."""
    from petalite.node.bootstrap import run

    run(node.listening(BOOTSTRAP_LISTEN, new_swarm=not node.peers))


@app.command()
@grouped
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    blocks: Blocks,
    way: Way,
    choosing: Choosing,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where the time went.")] = False,
) -> None:
    """Print the text that follows a prompt, as it comes."""
    from petalite.node.talk import generate as run

    run(model, blocks, way, choosing, prompt, chat_template=chat_template, verbose=verbose)


@app.command()
@grouped
def chat(
    model: Model,
    blocks: Blocks,
    way: Way,
    choosing: Choosing,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")
    ] = None,
) -> None:
    """Talk with a chat model, line by line. An empty line or Ctrl-D ends the talk."""
    from petalite.node.talk import chat as run

    run(model, blocks, way, choosing, system)


@app.command()
@grouped
def status(joining: Joining) -> None:
    """Show which models a swarm serves, who serves which blocks, and what is missing."""
    from petalite.node.status import run

    run(joining.node())


@app.command("import-gguf")
def import_gguf(
    file: Annotated[Path, typer.Argument(help="A GGUF file of the llama architecture.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the model folder; must not exist.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Turn a GGUF file into a model folder: config, safetensors, tokenizer, chat template."""
    from petalite.node.importing import run

    run(file, folder, dtype)


@app.command()
def quantize(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    quant: Annotated[str, typer.Option(help="int8 (half of bfloat16) or nf4 (a quarter).")] = "int8",
    blocks: Annotated[str | None, typer.Option(help="Blocks to take, START:END. By default all.")] = None,
) -> None:
    """Quantize blocks of MODEL into a folder that `serve` loads without the model's own files."""
    from petalite.node.quantizing import run

    run(model, quant, blocks, folder)


@app.command()
def manifest(model: Model) -> None:
    """Write MODEL/manifest.json: the SHA-256 of every tensor. It tells fine-tunes of one name apart."""
    from petalite.node.manifesting import run

    run(model)


@app.command()
def adapters(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of versions.")],
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Show what two of them differ in, by path or digest instead."),
    ] = None,
) -> None:
    """List versions of trained parts (prompts, LoRA, heads), and which was trained on from which."""
    from petalite.node.adapters import run

    run(folder, diff)


@app.command()
def demo() -> None:
    """Start a small swarm of processes here, ask it two questions, and kill a server during the second."""
    from petalite.node.demo import run

    raise typer.Exit(run())


def main() -> None:
    """Errors of petalite's own end in one sentence and exit code 2, output that nothing takes in one and
    code 1; everything else is a bug and shows itself.
    """
    for descriptor in range(3):  # closed ones would be given to sockets, and be spoken to
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # a letter that a terminal has not ends no conversation
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # it was closed when this began
                sys.stdout.flush()
    except PetaliteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        print(f"error: cannot write: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to write is tried again at the end
        sys.exit(1)
