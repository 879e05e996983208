"""The command line as people meet it: every wrong input ends in one sentence and exit code 2, and nothing
hangs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from petalite.model.checkpoint import Checkpoint
from petalite.net.identity import Identity
from petalite.node import cli
from petalite.node.processes import NodeProcess, bootstrap_node, serve_node
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.lora import factors, peft_folder

ANYONE = str(Identity.from_seed(b"\x01" * 32).peer_id)
NOBODY = f"/ip4/127.0.0.1/tcp/9/p2p/{ANYONE}"  # the discard port: nothing listens there
DEADLINE_S = 60


def petalite(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "petalite.node", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_output_that_nothing_takes_ends_in_a_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        for arguments in (["--help"], ["status", "--help"]):
            command = [sys.executable, "-m", "petalite.node", *arguments]
            result = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False
            )
            assert (result.returncode, result.stderr) == (1, "error: cannot write: No space left on device\n")


def test_an_interrupt_while_it_loads_ends_in_a_word(tmp_path: Path) -> None:
    """Sent by a module that stands for one of those that are loaded first."""
    (tmp_path / "typer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    result = subprocess.run(
        [sys.executable, "-m", "petalite.node", "--help"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


Here = Callable[..., subprocess.CompletedProcess[str]]
Refused = Callable[..., str]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the command line in this process, which is seconds quicker than in another. What is no error of
    petalite's own is raised here, and fails the test.
    """

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["petalite", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return subprocess.CompletedProcess(arguments, code, output.out, output.err)

    return run


@pytest.fixture
def refused(here: Here) -> Refused:
    """Expects exit code 2 and one sentence, which it returns."""

    def run(*arguments: str) -> str:
        result = here(*arguments)
        assert result.returncode == 2, result.stdout + result.stderr
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        return lines[0]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=4)
    (folder / "chat_template.jinja").write_text("{% for one in messages %}{{ one.content }}\n{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def half_swarm(model: Path) -> Iterator[NodeProcess]:
    """A swarm in which nobody serves blocks 2 and 3; who serves 0 and 1 lends a LoRA."""
    checkpoint = Checkpoint.open(model)
    tone = peft_folder(checkpoint, factors(checkpoint, ("query",), range(4)), model.parent / "tone")
    with serve_node(str(model), "0:2", [], "--adapter", str(tone)) as server:
        yield server


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def name_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = {"model.embed_tokens.weight": "model-1.safetensors"}
    names |= dict.fromkeys(
        (
            f"model.layers.{block}.{part}.weight"
            for block in range(4)
            for part in (
                *(f"self_attn.{letter}_proj" for letter in "qkvo"),
                *(f"mlp.{which}_proj" for which in ("gate", "up", "down")),
                "input_layernorm",
                "post_attention_layernorm",
            )
        ),
        "model-2.safetensors",
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (truncate, "model.safetensors"),
    "an index that names a missing shard": (name_a_missing_shard, "model-2.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
    "an unsupported architecture": (edit_config(model_type="mamba"), "mamba"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_serving_a_broken_folder(refused: Refused, case: str, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    breaks, named = BROKEN_FOLDERS[case]
    breaks(folder)
    assert named in refused("serve", str(folder), "--new-swarm", "--listen", "/ip4/127.0.0.1/tcp/0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--blocks", "0:9"], "0:4"),
        (["--blocks", "3:3"], "3:3"),
        (["--blocks", "first"], "first"),
        (["--blocks", "0:2", "--dtype", "int3"], "int3"),
        (["--blocks", "0:2", "--name", "a b"], "a b"),
        (["--adapter", "/nowhere/adapter"], "/nowhere/adapter"),
        (["--peers", NOBODY], "--new-swarm"),
        (["--swarm-key", "/nowhere/key"], "/nowhere/key"),
        (["--listen", "127.0.0.1:80"], "127.0.0.1:80"),
        (["--listen", "/ip4/203.0.113.7/tcp/0"], "203.0.113.7"),
    ],
)
def test_serving_with_options_that_cannot_work(
    refused: Refused, model: Path, arguments: list[str], named: str
) -> None:
    assert named in refused("serve", str(model), "--new-swarm", *arguments)


def test_serving_without_saying_which_swarm(refused: Refused, model: Path) -> None:
    assert "--new-swarm" in refused("serve", str(model))


def test_a_model_that_is_not_there(refused: Refused) -> None:
    assert "nowhere" in refused("generate", "/tmp/nowhere-at-all", "--local", "--prompt", "x")


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("localhost:31330", "localhost:31330"),
        ("/ip4/127.0.0.1/udp/1", "udp"),
        ("/ip4/127.0.0.1/tcp/9/p2p/Qm", "Qm"),
        (NOBODY, "/ip4/127.0.0.1/tcp/9"),
    ],
)
def test_a_peer_address_that_does_not_parse_or_answer(
    refused: Refused, model: Path, address: str, named: str
) -> None:
    assert named in refused("generate", str(model), "--peers", address, "--prompt", "x")
    assert named in refused("status", "--peers", address)


def test_somebody_else_answers_at_the_address(refused: Refused, half_swarm: NodeProcess, model: Path) -> None:
    address = str(half_swarm.address).replace(str(half_swarm.peer_id), ANYONE)
    assert ANYONE in refused("generate", str(model), "--peers", address, "--prompt", "x")


def test_a_block_that_nobody_serves(
    here: Here, refused: Refused, half_swarm: NodeProcess, model: Path
) -> None:
    peers = ("--peers", str(half_swarm.address))
    assert "blocks 2:4" in refused("generate", str(model), *peers, "--prompt", "x", "--wait", "0")
    status = here("status", *peers)
    assert status.returncode == 0
    assert "nobody serves blocks 2:4" in status.stdout
    assert "1100" in status.stdout
    assert "adapter tone" in status.stdout


def test_a_prompt_longer_than_the_model_takes(refused: Refused, model: Path) -> None:
    message = refused("generate", str(model), "--local", "--prompt", "x " * 3000)
    assert "prompt" in message and "tokens" in message


def test_generate_says_where_the_blocks_are_to_be(refused: Refused, model: Path) -> None:
    assert "--local" in refused("generate", str(model), "--prompt", "x")


def test_options_of_choosing_that_cannot_work_together(refused: Refused, model: Path) -> None:
    where = ("generate", str(model), "--local", "--prompt", "x")
    assert "temperature above 0" in refused(*where, "--top-p", "0.9")
    assert "repetition_penalty" in refused(*where, "--repetition-penalty", "0")
    assert "nowhere" in refused(*where, "--speculate", "/tmp/nowhere-at-all")
    assert "leave out temperature" in refused(*where, "--beams", "2", "--temperature", "1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--route", "square"], "ring, star"),
        (["--wire", "q3"], "q8"),
        (["--only", "alice"], "alice"),
        (["--avoid", "12D3Koo"], "12D3Koo"),
        (["--local", "--peers", NOBODY], "one of them"),
        (["--local", "--route", "star"], "--route"),
    ],
)
def test_ways_that_do_not_exist(refused: Refused, model: Path, arguments: list[str], named: str) -> None:
    where = [] if "--local" in arguments else ["--peers", NOBODY]
    assert named in refused("generate", str(model), "--prompt", "x", *where, *arguments)
    assert named in refused("chat", str(model), *where, *arguments)


def test_errors_leave_a_process_with_one_sentence() -> None:
    result = petalite("generate", "/tmp/nowhere-at-all", "--local", "--prompt", "x")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_the_way_through_a_swarm_is_a_matter_of_choice(model: Path, here: Here, refused: Refused) -> None:
    """Ring, star, beams and a lossy wire give text; without its only server there are no blocks."""
    with serve_node(str(model), "0:4", []) as server:
        where = (str(model), "--peers", str(server.address), "--max-new-tokens", "8", "--wait", "0")
        prompt = ("--prompt", "abc")
        plain = here("generate", *where, *prompt, "--only", str(server.address))
        other = here("generate", *where, *prompt, "--route", "star", "--wire", "f32", "--avoid", ANYONE)
        assert plain.returncode == 0 and plain.stdout == other.stdout
        searched = here("generate", *where, *prompt, "--beams", "3", "--wire", "q8", "--verbose")
        assert searched.returncode == 0 and "whole step" in searched.stderr
        talks = [here("chat", *where, "--beams", beams, stdin="hi\nho\n\n") for beams in ("1", "2")]
        assert all(talk.returncode == 0 and talk.stdout.count("you  ") == 3 for talk in talks)
        nobody = refused("generate", *where, *prompt, "--avoid", str(server.peer_id))
        assert "no server holds blocks 0:4" in nobody


def test_generate_with_every_option_of_choosing(here: Here, model: Path) -> None:
    """The same text with speculation as without, and a table of where the time went."""
    where = ("generate", str(model), "--local", "--prompt", "abcabcabc", "--max-new-tokens", "30")
    how = ("--temperature", "0.5", "--top-k", "9", "--min-p", "0.1", "--seed", "1", "--stop", "zzzz")
    how += ("--presence-penalty", "0.5", "--frequency-penalty", "0.1", "--repetition-penalty", "1.1")
    plain = here(*where, *how)
    speculative = here(*where, *how, "--speculate", "lookup", "--verbose")
    assert plain.returncode == speculative.returncode == 0, plain.stderr + speculative.stderr
    assert plain.stdout == speculative.stdout
    assert "whole step" in speculative.stderr and "new tokens" in speculative.stderr


def test_an_empty_swarm_says_so(here: Here) -> None:
    with bootstrap_node() as bootstrap:
        status = here("status", "--peers", str(bootstrap.address))
    assert status.returncode == 0
    assert "serves no model" in status.stdout


def test_bootstrap_keeps_its_identity_in_a_private_file(tmp_path: Path) -> None:
    identity = tmp_path / "keys" / "node"
    ids = []
    for _ in range(2):
        with NodeProcess(
            "bootstrap", "--listen", "/ip4/127.0.0.1/tcp/0", "--identity", str(identity)
        ) as node:
            ids.append(node.peer_id)
    assert ids[0] == ids[1] == Identity.load(identity).peer_id
    assert identity.stat().st_mode & 0o777 == 0o600


def test_a_child_is_heard_after_letters_that_are_none() -> None:
    said = r"printf '\377\n  address  /ip4/127.0.0.1/tcp/5\n'"
    with NodeProcess(wrap=lambda command: ["sh", "-c", said]) as node:
        assert str(node.address) == "/ip4/127.0.0.1/tcp/5"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_leaves_cleanly(here: Here, number: signal.Signals, model: Path) -> None:
    """Told to stop, it withdraws its records: the swarm that is left knows at once, without waiting for a
    TTL.
    """
    with bootstrap_node() as bootstrap:
        with serve_node(str(model), "0:4", [bootstrap.address]) as server:
            assert server.address
            assert "0:4" in here("status", "--peers", str(bootstrap.address)).stdout
            assert server.stop(number) == 0
            assert "Traceback" not in server.output
        assert "serves no model" in here("status", "--peers", str(bootstrap.address)).stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_node_that_is_still_joining_can_be_stopped(number: signal.Signals, code: int) -> None:
    """Its bootstrap accepts and says nothing; the signal comes once it has dialled."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE_S)
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{ANYONE}"
        node = NodeProcess("bootstrap", "--listen", "/ip4/127.0.0.1/tcp/0", "--peers", address)
        with node, silent.accept()[0]:
            assert node.stop(number) == code
        assert node.output == ""


def test_ctrl_c_in_a_generation(model: Path) -> None:
    """It stops in the middle of the text, without a word of Python."""
    with serve_node(str(model), "0:4", []) as server:
        command = [sys.executable, "-m", "petalite.node", "generate", str(model), "--prompt", "x"]
        command += ["--peers", str(server.address), "--max-new-tokens", "2000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode not in (0, None)
        assert b"Traceback" not in errors


def test_a_manifest_gives_the_folder_its_version(here: Here, refused: Refused, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    assert "tiny@" in here("manifest", str(folder)).stdout
    assert (folder / "manifest.json").is_file()
    assert "no folder" in refused("manifest", str(tmp_path / "none"))


def test_help_is_quick() -> None:
    """No torch: `--help` and `bootstrap` stay usable on small machines."""
    code = (
        "import sys; from petalite.node import cli; sys.argv = ['petalite', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    began_s = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"took {time.monotonic() - began_s:.1f} s and loaded torch"
    assert "serve" in result.stdout


@pytest.mark.parametrize("note", ["[/]", "[/b] is no markup", "[bold]", "\x1b[2J\nx"])
def test_adapters_takes_nobodys_word_for_markup(tmp_path: Path, here: Here, note: str) -> None:
    from petalite.model.versions import Card, write_version

    card = Card(f"tiny{note}@0", "prompt", {note: note}, {note: 1.0}, note=note)
    one = write_version(tmp_path, {"prompt": torch.zeros(2)}, card)
    other = write_version(tmp_path, {"prompt": torch.ones(2)}, card)
    for arguments in ((), ("--diff", one.short, other.short)):
        shown = here("adapters", str(tmp_path), *arguments)
        assert shown.returncode == 0 and "\x1b[2J" not in shown.stdout
    assert "".join(letter if letter.isprintable() else "\ufffd" for letter in note) in (
        here("adapters", str(tmp_path)).stdout
    )


def test_names_that_no_file_can_have(tmp_path: Path, refused: Refused) -> None:
    name = "x" * 400
    assert "begins with" in refused("adapters", str(tmp_path), "--diff", name, "abcd")
    assert "there is no file" in refused("import-gguf", name, str(tmp_path / "new"))


@pytest.mark.parametrize("room", ["inf", "1e300"])
def test_memory_without_end(here: Here, model: Path, room: str) -> None:
    result = here("serve", str(model), "--new-swarm", "--memory", room)
    assert result.returncode == 2 and "--memory" in result.stderr


def test_a_terminal_of_few_letters_and_one_that_is_gone(model: Path) -> None:
    command = [sys.executable, "-m", "petalite.node", "generate", str(model), "--local", "--prompt", "a"]
    command += ["--max-new-tokens", "40"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    said = subprocess.run(command, capture_output=True, env=environment, timeout=DEADLINE_S, check=False)
    assert said.returncode == 0 and said.stdout.isascii(), said.stderr
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, timeout=DEADLINE_S, check=False
    )
    assert closed.returncode == 0, closed.stderr


def test_adapters_shows_versions_and_what_two_differ_in(tmp_path: Path, refused: Refused) -> None:
    from petalite.model.versions import Card, write_version

    first = write_version(tmp_path, {"prompt": torch.zeros(2, 3)}, Card("tiny@0", "prompt", {"n_tokens": 2}))
    second = write_version(
        tmp_path,
        {"prompt": torch.ones(2, 3)},
        Card("tiny@0", "prompt", {"n_tokens": 2}, {"loss": 0.25}, first.digest, "better"),
    )
    (tmp_path / "broken.safetensors").write_bytes(b"\x00")
    listed = petalite("adapters", str(tmp_path))
    assert listed.returncode == 0 and "broken.safetensors" in listed.stderr
    lines = [line for line in listed.stdout.splitlines() if first.short in line or second.short in line]
    assert [first.short in line for line in lines] == [True, False]
    assert f"└ {second.short}" in lines[1] and "loss=0.25" in lines[1] and "better" in lines[1]
    compared = petalite("adapters", str(tmp_path), "--diff", first.short, second.short)
    assert "metrics.loss" in compared.stdout and "settings" not in compared.stdout
    assert "begins with 'ffff'" in refused("adapters", str(tmp_path), "--diff", first.short, "ffff")
    assert "no folder" in refused("adapters", str(tmp_path / "nowhere"))
