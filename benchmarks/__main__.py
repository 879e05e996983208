"""`python -m benchmarks NAME [--json]`: run one benchmark, or `all` of them."""

from __future__ import annotations

import argparse
import importlib
import os

# Each is a module here with `run() -> Report`.
BENCHMARKS = {
    "net": "messages and tensors between two processes: loopback, and the lab's slow and lossy links",
    "hop": "what a hop over loopback adds to a decode step",
    "wan": "steps and prefills over three servers on long links, ring and star",
    "recovery": "from SIGKILL to the next token",
    "speculate": "tokens/s with guesses looked up or made by a small model, on long links and on loopback",
    "beams": "what a token costs with 2, 4 and 8 beams, over three servers on long links and on loopback",
    "table1": "steps/s over servers that fail, by policy, as in the paper's Table 1",
    "serve": "many sessions on one server, and one beside a long prefill",
    "training": "forward and backward of batches over three servers, beside one process; a kill; memory",
    "beside": "training calls at one server beside plain autograd, and a session beside training calls",
    "decode": "SmolLM2 token by token, in every format, beside transformers and llama.cpp",
    "prefill": "SmolLM2 prefill of 512 tokens in one process, beside transformers and llama.cpp",
    "quality": "what int8, nf4 and others' formats cost SmolLM2: perplexity, divergence, greedy answers",
    "contended": "SmolLM2 token by token while another process takes one of two cores, beside llama.cpp",
    "linear": "one large native linear in every format, weights cold, beside what memory gives and torch's",
    "gpu": "decode steps on a GPU, replayed as graphs beside launched one by one",
    "load": "loading 8 blocks from a cold disk, beside reading their bytes, and the memory it takes",
    "codec": "the wire codec q8: rate, and error on real hidden states, beside bitsandbytes and absmax int8",
    "dht": "the DHT: simulated swarms of up to 10,000 nodes, 32 real nodes, beside `kademlia`",
    "placement": "which blocks servers take, simulated: balance and moves, beside the ancestor's rule",
    "footprint": "start and memory of a bootstrap node; what a server reads from disk and takes of memory",
}


def _insist_on_native_kernels(parser: argparse.ArgumentParser) -> None:
    """Those of these sources, in the processes that a benchmark starts, too; unless told otherwise. Without
    them torch's would serve, and their figures be taken for ours.
    """
    from petalite.errors import InvalidArgument  # after what torch's threads are told in the environment
    from petalite.kernels import native

    os.environ[native.VARIABLE] = os.environ.get(native.VARIABLE) or "native"
    try:
        native.library()
    except InvalidArgument as error:
        parser.error(f"{error}; or measure torch's kernels with {native.VARIABLE}=torch")


def main() -> None:
    names = "\n".join(f"  {name:<10} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", choices=[*BENCHMARKS, "all"], metavar="NAME", help="one of those below, or all"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line alone, without the table")
    parser.add_argument(
        "--only", metavar="PART", default="", help="of a benchmark in parts, those whose name contains PART"
    )
    arguments = parser.parse_args()
    if arguments.name == "linear":
        # Else torch's threads spin on for milliseconds, on cores that the next product needs.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _insist_on_native_kernels(parser)
    for name in BENCHMARKS if arguments.name == "all" else [arguments.name]:
        module = importlib.import_module(f"benchmarks.{name}")
        known = ", ".join(getattr(module, "PARTS", ()))
        if arguments.only not in known:
            parser.error(f"{name} has no part {arguments.only!r}; known: {known or 'none'}")
        report = module.run(arguments.only) if arguments.only else module.run()
        if not arguments.json:
            report.show()
        print(report.json(), flush=True)


if __name__ == "__main__":
    main()
