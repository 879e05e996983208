"""The options that commands share, in groups, and the settings that they become.

Each group is a panel of `--help`, named by its docstring. Nothing heavy is imported before a group is asked
for what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from petalite.errors import InvalidArgument
from petalite.net.identity import PeerId
from petalite.node.settings import NodeSettings

if TYPE_CHECKING:
    from petalite.client.options import Options
    from petalite.client.settings import Routing, SessionSettings
    from petalite.server.loaded import ComputeSettings
    from petalite.server.memory import MemorySettings

SERVE_LISTEN = "/ip4/0.0.0.0/tcp/0"
BOOTSTRAP_LISTEN = "/ip4/0.0.0.0/tcp/31330"
LOSSLESS = "raw"

Name = Annotated[
    str | None,
    Option(metavar="NAME", help="Of the model in the swarm; by default the folder's or repository's."),
]
Dtype = Annotated[
    str, Option(metavar="DTYPE", help="To compute in: float32, bfloat16, or auto, the checkpoint's.")
]


def separated(texts: list[str] | None) -> tuple[str, ...]:
    """The values of a repeated option; each use may hold several, with commas between."""
    return tuple(part for text in texts or () for part in text.split(",") if part)


def _peer_id(text: str) -> PeerId:
    """From an id or an address, whichever is at hand."""
    return PeerId.parse(text.rpartition("/p2p/")[2])


@dataclass(frozen=True, slots=True)
class Joining:
    """Which swarm"""

    peers: Annotated[
        list[str] | None,
        Option(
            metavar="ADDRESS",
            help="A peer to join through, /ip4/…/tcp/…/p2p/ID as a node prints it. Repeat, or commas.",
        ),
    ] = None
    lan: Annotated[
        bool,
        Option("--lan", help="Find peers on the local network by multicast DNS, and be found by them."),
    ] = False
    swarm_key: Annotated[Path | None, Option(metavar="FILE", help="The 32-byte key of a private swarm.")] = (
        None
    )

    def addresses(self) -> tuple[str, ...]:
        return separated(self.peers)

    def node(self) -> NodeSettings:
        """Of one that only looks."""
        return NodeSettings.parse(self.addresses(), False, [], None, self.swarm_key, self.lan)


@dataclass(frozen=True, slots=True)
class Listening(Joining):
    """This node, and which swarm it joins"""

    listen: Annotated[
        list[str] | None,
        Option(
            metavar="ADDRESS",
            help="Where to listen; port 0 is any free one. May be repeated. By default every interface, "
            "`serve` at a free port and `bootstrap` at 31330.",
        ),
    ] = None
    identity: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Key file, made if absent: the node keeps its peer id over restarts, and the peers it knows "
            "in FILE.peers.",
        ),
    ] = None

    def listening(self, default: str, *, new_swarm: bool) -> NodeSettings:
        listen = self.listen or [default]
        return NodeSettings.parse(
            self.addresses(), new_swarm, listen, self.identity, self.swarm_key, self.lan
        )


@dataclass(frozen=True, slots=True)
class Blocks(Joining):
    """Where the blocks are"""

    local: Annotated[bool, Option("--local", help="In this process, all of them; no swarm.")] = False
    name: Name = None
    wait: Annotated[
        float,
        Option(
            metavar="SECONDS", help="How long to wait for a server of blocks that nobody serves.", min=0.0
        ),
    ] = 15.0
    dtype: Dtype = "auto"

    def check(self) -> None:
        """Raises InvalidArgument where they are said to be nowhere, or in two places."""
        if (bool(self.peers) or self.lan) == self.local:
            raise InvalidArgument(
                "say where the blocks are: --peers ADDRESS or --lan in a swarm, --local in this process"
                if not self.local
                else "--local runs every block here, --peers and --lan in a swarm; give one of them"
            )


@dataclass(frozen=True, slots=True)
class Compute:
    """How this machine computes"""

    dtype: Dtype = "auto"
    quant: Annotated[
        str | None, Option(metavar="FORMAT", help="Of weights: int8, nf4, or none (as they are).")
    ] = None
    device: Annotated[str, Option(metavar="DEVICE", help="auto, cpu, cuda or mps.")] = "auto"
    threads: Annotated[
        int | None,
        Option(
            metavar="N", help="CPU threads for tensor work; at most and by default one for each core.", min=1
        ),
    ] = None

    def settings(self) -> ComputeSettings:
        from petalite.node.smollm2 import cache_folder
        from petalite.server.loaded import ComputeSettings

        return ComputeSettings(self.dtype, self.quant, self.device, self.threads, cache_folder())


@dataclass(frozen=True, slots=True)
class Room:
    """How much it takes on"""

    memory: Annotated[
        float | None,
        Option(
            metavar="GIB",
            help="For blocks and cache together. By default half of what is free.",
            min=0.001,
            max=2**30,
        ),
    ] = None
    cache_tokens: Annotated[
        int, Option(metavar="N", help="Room for so many tokens of all sessions together.", min=1)
    ] = 65536
    max_sessions: Annotated[int, Option(metavar="N", help="Sessions open at once.", min=1)] = 256

    def memory_settings(self) -> MemorySettings:
        from petalite.server.memory import MemorySettings

        return MemorySettings(self.cache_tokens, None if self.memory is None else int(self.memory * 2**30))


@dataclass(frozen=True, slots=True)
class Tuning:
    """Fine-tuning"""

    adapter: Annotated[
        list[Path] | None,
        Option(
            metavar="DIR",
            help="A LoRA to lend, in PEFT's format: sessions may ask for it. May be repeated.",
            show_default=False,
        ),
    ] = None
    training_share: Annotated[
        float,
        Option(
            metavar="P", help="Training calls may have this part of the cache's room; 0: none.", min=0, max=1
        ),
    ] = 0.5


@dataclass(frozen=True, slots=True)
class Way:
    """The way through the swarm"""

    route: Annotated[
        str,
        Option(
            metavar="ring|star",
            help="ring: servers push to each other, the fewest trips. star: every edge passes this process.",
        ),
    ] = "ring"
    wire: Annotated[
        str,
        Option(
            metavar="raw|q8|bf16|f16|f32|…+zstd",
            help="How hidden states travel: raw loses nothing; q8 is a quarter of float32, and rounds. With "
            "+zstd, as in bf16+zstd, they are also compressed, which loses nothing and costs time.",
        ),
    ] = LOSSLESS
    only: Annotated[
        list[str] | None,
        Option(
            metavar="PEER",
            help="Use no other servers. An id, or an address as `status` shows it. Repeat, or commas.",
        ),
    ] = None
    avoid: Annotated[
        list[str] | None, Option(metavar="PEER", help="Never use this server. Repeat, or commas.")
    ] = None

    def routing(self) -> Routing:
        from petalite.client.settings import Routing

        only, avoided = (frozenset(map(_peer_id, separated(peers))) for peers in (self.only, self.avoid))
        return Routing(self.route, allowed=only or None, blocked=avoided)

    def session(self, wait_s: float) -> SessionSettings:
        from petalite.client.settings import SessionSettings

        wire = None if self.wire == LOSSLESS else self.wire
        return SessionSettings(open_s=wait_s, recovery_s=wait_s, wire=wire)


@dataclass(frozen=True, slots=True)
class Choosing:
    """What text comes out"""

    max_new_tokens: Annotated[int, Option(metavar="N", help="Stop after so many tokens.", min=1)] = 256
    temperature: Annotated[float, Option(metavar="T", help="0 is greedy; above, sample.", min=0.0)] = 0.0
    top_k: Annotated[int, Option(metavar="K", help="Sample among the K likeliest tokens; 0: all.", min=0)] = 0
    top_p: Annotated[float, Option(metavar="P", help="Sample among the likeliest tokens that sum to P.")] = (
        1.0
    )
    min_p: Annotated[
        float, Option(metavar="P", help="Sample among those at least P times as likely as the likeliest.")
    ] = 0.0
    seed: Annotated[int | None, Option(metavar="N", help="Make sampling repeatable.", min=0)] = None
    repetition_penalty: Annotated[
        float, Option(metavar="X", help="Above 1: say less of what the text has already.")
    ] = 1.0
    presence_penalty: Annotated[float, Option(metavar="X", help="Subtracted from what was said.")] = 0.0
    frequency_penalty: Annotated[
        float, Option(metavar="X", help="Subtracted as often as a thing was said.")
    ] = 0.0
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="End before this text. Repeat.")] = None
    beams: Annotated[
        int,
        Option(
            metavar="N", help="Search with so many beams for the likeliest text, shown when found.", min=1
        ),
    ] = 1
    speculate: Annotated[
        str | None,
        Option(
            metavar="lookup|MODEL",
            help="Guess ahead, so that one trip brings several tokens of the same text: from what the text "
            "said before, or by a small model with the same tokenizer that runs here.",
        ),
    ] = None

    def options(self) -> Options:
        """Raises InvalidArgument for values that cannot work, alone or together."""
        from petalite.client.options import Options

        values = {name: getattr(self, name) for name in Choosing.__slots__ if name != "beams"}
        return Options(**values | {"stop": tuple(self.stop or ())})
