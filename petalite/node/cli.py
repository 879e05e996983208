"""The commands and their options. Each builds settings and hands over to a module that does the work.

Nothing heavy is imported until a command needs it: `--help` and `bootstrap` load no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from petalite.errors import PetaliteError
from petalite.node.settings import ModelSource, NodeSettings, addresses

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
SERVE_LISTEN = "/ip4/0.0.0.0/tcp/0"
BOOTSTRAP_LISTEN = "/ip4/0.0.0.0/tcp/31330"

Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peers",
        metavar="ADDRESS",
        help="A peer to join through, /ip4/…/tcp/…/p2p/ID as a node prints it. Several: repeat, or commas.",
        show_default=False,
    ),
]
Lan = Annotated[
    bool,
    typer.Option("--lan", help="Find peers on the local network by multicast DNS, and be found by them."),
]
SwarmKey = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The 32-byte key of a private swarm.", show_default=False),
]
IdentityFile = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="Key file, made if absent: the node keeps its peer id over restarts, and the peers it knows "
        "in FILE.peers.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="Name of the model in the swarm; by default the folder's or repo's."),
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32 or bfloat16.")]
Wait = Annotated[
    float,
    typer.Option("--wait", help="Seconds to wait for servers of blocks that nobody serves.", min=0.0),
]
MaxNewTokens = Annotated[int, typer.Option(help="Stop after so many tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above, sample.", min=0.0)]
TopK = Annotated[int, typer.Option(help="Sample among the K likeliest tokens; 0: all.", min=0)]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens that sum to P.")]
MinP = Annotated[float, typer.Option(help="Sample among those at least P times as likely as the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Make sampling repeatable.", min=0)]
Repetition = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: say less of what the text has already.")
]
Presence = Annotated[float, typer.Option("--presence-penalty", help="Subtracted from what was said.")]
Frequency = Annotated[
    float, typer.Option("--frequency-penalty", help="Subtracted as often as a thing was said.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this text. May be repeated.", metavar="TEXT", show_default=False),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        metavar="lookup|MODEL",
        help="Guess ahead, so that one trip brings several tokens of the same text: from what the text has "
        "said before, or by a small model with the same tokenizer that runs here.",
        show_default=False,
    ),
]


@app.command()
def serve(
    model: Model,
    blocks: Annotated[
        str,
        typer.Option(
            help="Blocks to serve, START:END; or auto: as many as fit, where the swarm needs them, and "
            "others when it needs those more."
        ),
    ] = "auto",
    peers: Peers = None,
    lan: Lan = False,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Be the first node of a new swarm.")] = False,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="Where to listen; port 0 is any free one. May be repeated.",
            show_default=SERVE_LISTEN,
        ),
    ] = None,
    identity: IdentityFile = None,
    swarm_key: SwarmKey = None,
    name: Name = None,
    dtype: Dtype = "auto",
    cache_tokens: Annotated[
        int, typer.Option(help="Room for this many tokens of all sessions together.", min=1)
    ] = 65536,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="For blocks and cache together. By default half of what is free.",
            min=0.001,
            show_default=False,
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="Weights as int8, nf4 or none (as they are).", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads for tensor work.", min=1)] = None,
    max_sessions: Annotated[int, typer.Option(help="Sessions open at once.", min=1)] = 256,
) -> None:
    """Serve blocks of MODEL to a swarm until Ctrl-C or SIGTERM."""
    from petalite.node.serve import run
    from petalite.node.smollm2 import cache_folder
    from petalite.server.loaded import ComputeSettings
    from petalite.server.memory import MemorySettings
    from petalite.server.server import ServerSettings
    from petalite.server.sessions import SessionSettings
    from petalite.swarm.spans import Span

    settings = ServerSettings(
        blocks=None if blocks == "auto" else Span.parse(blocks),
        name=name,
        compute=ComputeSettings(dtype, quant, device, threads, cache_folder()),
        memory=MemorySettings(cache_tokens, None if memory is None else int(memory * 2**30)),
        sessions=SessionSettings(most=max_sessions),
    )
    node = NodeSettings.parse(peers, new_swarm, listen or [SERVE_LISTEN], identity, swarm_key, lan)
    run(model, settings, node)


@app.command()
def bootstrap(
    peers: Peers = None,
    lan: Lan = False,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS", help="Where to listen. May be repeated.", show_default=BOOTSTRAP_LISTEN
        ),
    ] = None,
    identity: IdentityFile = None,
    swarm_key: SwarmKey = None,
) -> None:
    """Run a node that others join through. It holds no blocks and needs little of anything."""
    from petalite.node.bootstrap import run

    run(NodeSettings.parse(peers, not peers, listen or [BOOTSTRAP_LISTEN], identity, swarm_key, lan))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    peers: Peers = None,
    lan: Lan = False,
    local: Annotated[bool, typer.Option("--local", help="Run every block in this process.")] = False,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    stop: Stop = None,
    speculate: Speculate = None,
    swarm_key: SwarmKey = None,
    name: Name = None,
    dtype: Dtype = "auto",
    wait: Wait = 15.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where the time went.")] = False,
) -> None:
    """Print the text that follows a prompt, as it comes."""
    from petalite.client.options import Options
    from petalite.node.talk import generate as run

    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        speculate=speculate,
    )
    source = ModelSource(model, addresses(peers), lan, local, swarm_key, name, dtype, wait)
    run(source, prompt, options, chat_template=chat_template, verbose=verbose)


@app.command()
def chat(
    model: Model,
    peers: Peers = None,
    lan: Lan = False,
    local: Annotated[bool, typer.Option("--local", help="Run every block in this process.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    stop: Stop = None,
    speculate: Speculate = None,
    swarm_key: SwarmKey = None,
    name: Name = None,
    dtype: Dtype = "auto",
    wait: Wait = 15.0,
) -> None:
    """Talk with a chat model, line by line. An empty line or Ctrl-D ends the talk."""
    from petalite.client.options import Options
    from petalite.node.talk import chat as run

    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        speculate=speculate,
    )
    run(ModelSource(model, addresses(peers), lan, local, swarm_key, name, dtype, wait), system, options)


@app.command()
def status(
    peers: Peers = None,
    lan: Lan = False,
    swarm_key: SwarmKey = None,
) -> None:
    """Show which models a swarm serves, who serves which blocks, and what is missing."""
    from petalite.node.status import run

    run(NodeSettings.parse(peers, False, [], None, swarm_key, lan))


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
def demo() -> None:
    """Start a small swarm of processes here, ask it two questions, and kill a server during the second."""
    from petalite.node.demo import run

    raise typer.Exit(run())


def main() -> None:
    """Errors of petalite's own end in one sentence and exit code 2; everything else is a bug and shows
    itself.
    """
    try:
        app()
    except PetaliteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
