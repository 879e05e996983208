"""Tokenizers: streamed text against decoding all at once, ids that end a text, chat templates of every
place.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

from petalite.errors import InvalidArgument, InvalidCheckpoint, UnsupportedModel
from petalite.model.checkpoint import Checkpoint
from petalite.model.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.checkpoints import byte_tokenizer, tiny_llama

MESSAGES = [{"role": "user", "content": "Hello there"}]
HELLO, THERE, EMOJI = "Hello", " there", "🙂é€"


def llama_like() -> RawTokenizer:
    """As Llama 1 and 2 have it: '▁' for spaces, <0xNN> for bytes without a token, a space before it all."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁Hello", "Hello", "▁there", "there", "a", "é", "▁▁"]
    raw = RawTokenizer(models.BPE({word: id for id, word in enumerate(words)}, [], byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return raw


KINDS = {
    "bytes": Tokenizer(byte_tokenizer(), eos_ids=frozenset()),
    "llama": Tokenizer(llama_like(), eos_ids=frozenset()),
}
IDS = {
    "bytes": st.one_of(
        st.lists(st.integers(0, 257), max_size=24),
        st.text(max_size=12).map(lambda text: byte_tokenizer().encode(text).ids),
    ),
    "llama": st.lists(st.integers(0, 266), max_size=24),
}


def check_stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    """What was given out is always a beginning of the whole text; flushed, it is the text so far."""
    offset = len(tokenizer.decode(prompt).removesuffix("\ufffd"))
    whole = tokenizer.decode(prompt + ids)[offset:]
    stream, given_out = tokenizer.stream(prompt), ""
    for count, id in enumerate(ids, start=1):
        given_out += stream.step(id)
        assert whole.startswith(given_out)
        ended = tokenizer.stream(prompt)
        text = "".join(map(ended.step, ids[:count])) + ended.flush()
        visible = any(not tokenizer.is_special(id) for id in ids[:count])
        assert text == (tokenizer.decode(prompt + ids[:count])[offset:] if visible else "")
    assert given_out + stream.flush() == whole or not ids or all(map(tokenizer.is_special, ids))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_streaming_equals_decoding_all_at_once_for_every_prefix(kind: str, data: st.DataObject) -> None:
    prompt, ids = data.draw(IDS[kind]), data.draw(IDS[kind])
    check_stream(KINDS[kind], prompt, ids)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40), split=st.integers(0, 20))
@example(text=HELLO + THERE + EMOJI, split=3)
def test_streaming_a_real_vocabulary(smollm2: Path, text: str, split: int) -> None:
    tokenizer = real(smollm2)
    ids = tokenizer.encode(text)
    check_stream(tokenizer, ids[:split], ids[split:])


_REAL: dict[Path, Tokenizer] = {}


def real(folder: Path) -> Tokenizer:
    if folder not in _REAL:
        _REAL[folder] = load_tokenizer(Checkpoint.open(folder))
    return _REAL[folder]


def test_a_space_after_the_prompt_is_kept() -> None:
    """A decoder that strips the text's first space must not strip the continuation's."""
    tokenizer = KINDS["llama"]
    ids = {word: tokenizer._raw.token_to_id(word) for word in ("▁Hello", "▁there", "</s>")}
    stream = tokenizer.stream([ids["▁Hello"], ids["</s>"]])
    assert stream.step(ids["▁there"]) == " there"
    assert tokenizer.stream().step(ids["▁there"]) == "there"


def test_half_a_character_waits_and_flush_gives_it_up() -> None:
    tokenizer = KINDS["bytes"]
    euro = tokenizer.encode("€")
    assert [len(euro), *map(tokenizer.stream().step, euro[:2])] == [3, "", ""]
    stream = tokenizer.stream()
    assert [stream.step(id) for id in euro] == ["", "", "€"]
    assert [stream.step(euro[0]), stream.step(euro[1]), stream.flush(), stream.flush()] == [
        "",
        "",
        "\ufffd",
        "",
    ]
    assert stream.step(tokenizer.encode("a")[0]) == "a"


def test_a_long_text_costs_the_same_at_every_token(smollm2: Path) -> None:
    """The stream looks at a few ids only: what it keeps does not grow with the text."""
    tokenizer = real(smollm2)
    stream = tokenizer.stream(tokenizer.encode("once " * 500))
    for id in tokenizer.encode("upon a time " * 200):
        stream.step(id)
        assert len(stream._settled) + len(stream._pending) < 20


def test_equals_the_library_of_the_model(smollm2: Path) -> None:
    """Plain text and chats, against transformers' reading of the same files."""
    reference, tokenizer = AutoTokenizer.from_pretrained(smollm2), real(smollm2)
    for text in (
        "",
        "Hello  there\n\t12345",
        "def f(x):\n    return x  # naïve 🙂",
        "<|im_end|> in the text",
    ):
        assert tokenizer.encode(text) == reference(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(
            reference(text)["input_ids"], skip_special_tokens=True
        )
    chat = [*MESSAGES, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "12 + 30?"}]
    expected = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(chat) == expected
    assert tokenizer.eos_ids == {reference.eos_token_id}


# -- what a folder says ----------------------------------------------------------------------------------


def folder_with(tmp_path: Path, files: dict[str, Any], **config: Any) -> Checkpoint:
    folder = tiny_llama(tmp_path / "tiny", **config)
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({}, {"eos_token_id": 257}, {257}),
        ({}, {"eos_token_id": [7, 257]}, {7, 257}),
        ({}, {"eos_token_id": None}, set()),
        ({"generation_config.json": {"eos_token_id": [3, 4]}}, {"eos_token_id": 257}, {3, 4}),
        ({"generation_config.json": {}}, {"eos_token_id": 257}, {257}),
        (
            {"generation_config.json": {"eos_token_id": 3}, "tokenizer_config.json": {"eos_token": "</s>"}},
            {},
            {3, 257},
        ),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, {"eos_token_id": 5}, {5, 257}),
        ({"tokenizer_config.json": {"eos_token": "nosuch"}}, {"eos_token_id": 5}, {5}),
    ],
)
def test_ids_that_end_a_text(tmp_path: Path, files: Any, config: Any, expected: set[int]) -> None:
    assert load_tokenizer(folder_with(tmp_path, files, **config)).eos_ids == expected


JINJA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"chat_template": JINJA, "bos_token": "<s>"}},
        {"tokenizer_config.json": {"bos_token": {"content": "<s>"}}, "chat_template.jinja": JINJA},
        {
            "tokenizer_config.json": {"bos_token": "<s>", "chat_template": "old"},
            "chat_template.jinja": JINJA,
        },
        {
            "tokenizer_config.json": {
                "bos_token": "<s>",
                "chat_template": [
                    {"name": "tool_use", "template": "other"},
                    {"name": "default", "template": JINJA},
                ],
            }
        },
    ],
)
def test_chat_templates_of_every_place(tmp_path: Path, files: Any) -> None:
    """The template writes the beginning-of-text token; none is added before it."""
    tokenizer = load_tokenizer(folder_with(tmp_path, files))
    bos, *rest = tokenizer.encode_chat(MESSAGES)
    assert bos == 256
    assert tokenizer.decode(rest) == "[user]Hello there>"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, {}))
    with pytest.raises(InvalidArgument, match="no chat template"):
        tokenizer.encode_chat(MESSAGES)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, {})
    raw = byte_tokenizer()
    raw.enable_truncation(4)
    raw.enable_padding(length=16)
    raw.save(str(checkpoint.folder / "tokenizer.json"))
    assert len(load_tokenizer(checkpoint).encode("Hello there")) == 11


def broken(folder: Path, what: str) -> None:
    path = folder / "tokenizer.json"
    match what:
        case "missing":
            path.unlink()
        case "sentencepiece":
            path.rename(folder / "tokenizer.model")
        case "no JSON":
            path.write_text("{")
        case "no tokenizer":
            path.write_text("{}")
        case "config no JSON":
            (folder / "tokenizer_config.json").write_text("[]")
        case "binary template":
            (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
        case "endless template":
            with (folder / "chat_template.jinja").open("wb") as file:
                file.truncate(1 << 40)
        case "too many tokens":
            raw = byte_tokenizer()
            raw.add_tokens([f"token {number}" for number in range(10)])
            raw.save(str(path))


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("missing", InvalidCheckpoint, "has no tokenizer.json"),
        ("sentencepiece", UnsupportedModel, r"tokenizer\.model only"),
        ("no JSON", InvalidCheckpoint, "is not a tokenizer that can be read"),
        ("no tokenizer", InvalidCheckpoint, "is not a tokenizer that can be read"),
        ("config no JSON", InvalidCheckpoint, "expected an object"),
        ("binary template", InvalidCheckpoint, "cannot read .*chat_template"),
        ("endless template", InvalidCheckpoint, "is larger than 1 MiB"),
        ("too many tokens", InvalidCheckpoint, "token ids up to 267, but the model's vocabulary is 260"),
    ],
)
def test_a_broken_folder_is_one_clear_sentence(what: str, error: type, says: str, tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, {})
    broken(checkpoint.folder, what)
    with pytest.raises(error, match=says):
        load_tokenizer(checkpoint)


UNKNOWN = RawTokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[], unk_token="nowhere"))
PANICS = {  # changes to a file that the library reads, and then panics at
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    "decoder": {"type": "Strip", "content": "a", "start": 1 << 31, "stop": 1 << 31},
}


@pytest.mark.parametrize("part", PANICS)
def test_a_tokenizer_that_breaks_at_work(part: str, tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, {})
    path = checkpoint.folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: PANICS[part]}))
    tokenizer = load_tokenizer(checkpoint)
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json"):
        tokenizer.decode(tokenizer.encode("abc"))


def test_a_text_with_what_the_tokenizer_does_not_know() -> None:
    with pytest.raises(InvalidCheckpoint, match="nowhere"):
        Tokenizer(UNKNOWN, eos_ids=frozenset()).encode("abc")


@pytest.mark.parametrize(
    "config",
    ['{"eos_token": "\\ud800"}', '{"chat_template": [{"name": ["default"], "template": "x"}, {"name": {}}]}'],
)
def test_settings_that_name_nothing(config: str, tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, {})
    (checkpoint.folder / "tokenizer_config.json").write_text(config)
    tokenizer = load_tokenizer(checkpoint)
    with pytest.raises(InvalidArgument, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_text_that_is_no_text() -> None:
    with pytest.raises(InvalidArgument, match="cannot tokenize"):
        KINDS["bytes"].encode("\ud800")


def test_ids_beyond_the_vocabulary_have_no_text(smollm2: Path, tmp_path: Path) -> None:
    """A model's embedding may have more rows than the tokenizer has tokens, and choose one of them."""
    shutil.copytree(smollm2, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = load_tokenizer(Checkpoint.open(tmp_path / "m"))
    assert tokenizer.decode([60_000]) == ""
    assert tokenizer.stream().step(60_000) == ""
    assert tokenizer.vocab_size == 49152
