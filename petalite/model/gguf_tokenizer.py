"""A GGUF file's vocabulary as a `tokenizers` tokenizer: byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM
use it.

A GGUF file names its pre-tokenizer and leaves its rules to the reader; `PRE_TOKENIZERS` holds the rules for
each name, as those models' own tokenizer.json have them. Names that are not there are refused: a near guess
would split numbers wrongly and nobody would see it. Knows vocabularies; knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from petalite.errors import InvalidCheckpoint, UnsupportedModel

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

# The rules of cl100k, which Llama 3 and Qwen share but for how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a name stands for."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False  # text is brought to Unicode's composed form first
    ignore_merges: bool = False  # a word that is a token is not built from merges


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def split() -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return split


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_gpt2),
    "smollm": PreTokenizer(_smollm),
    "llama-bpe": PreTokenizer(_words(r"\p{N}{1,3}"), ignore_merges=True),
    "qwen2": PreTokenizer(_words(r"\p{N}"), nfc=True),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """From the `tokenizer.ggml.*` keys of a file. Raises UnsupportedModel, InvalidCheckpoint."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModel(f"the GGUF file's tokenizer is {kind!r}; byte-level BPE ('gpt2') is supported")
    name = metadata.get("tokenizer.ggml.pre")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise UnsupportedModel(
            f"the GGUF file's pre-tokenizer {name!r} is not supported; "
            f"supported are {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    merges = [_merge(text) for text in _strings(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InvalidCheckpoint("the GGUF file's vocabulary names a token twice")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    except Exception as error:  # the library raises plain Exception
        raise InvalidCheckpoint(f"the GGUF file's merges do not fit its vocabulary: {error}") from error
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type"))
    tokenizer.post_processor = _post_processor(tokens, metadata)
    return tokenizer


def token_at(metadata: Mapping[str, Any], key: str) -> tuple[int, str] | None:
    """The id and text of a token such as `bos_token_id`; None if the file names none."""
    id = metadata.get(f"tokenizer.ggml.{key}")
    if id is None:
        return None
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    if not isinstance(id, int) or not 0 <= id < len(tokens):
        raise InvalidCheckpoint(f"the GGUF file's {key} {id!r} is outside its vocabulary of {len(tokens)}")
    return id, tokens[id]


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InvalidCheckpoint(f"the GGUF file's {key} is not a list of texts")
    return values


def _merge(text: str) -> tuple[str, str]:
    match text.split(" "):
        case [left, right]:
            return left, right
    raise InvalidCheckpoint(f"the GGUF file has a merge {text[:40]!r}, which is not of two tokens")


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Any) -> None:
    if not isinstance(types, list) or len(types) != len(tokens):
        raise InvalidCheckpoint("the GGUF file's token types do not fit its vocabulary")
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            special = kind == _CONTROL
            added = AddedToken(token, special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])


def _post_processor(tokens: Sequence[str], metadata: Mapping[str, Any]) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    bos = token_at(metadata, "bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token") or bos is None:
        return byte_level
    id, token = bos
    # By a name of our own: a token's text may be one that templates read otherwise.
    beginning = {"id": "bos", "ids": [id], "tokens": [token]}
    return processors.Sequence(
        [
            byte_level,
            processors.TemplateProcessing(
                single=["bos", "$A"], pair=["bos", "$A", "bos:1", "$B:1"], special_tokens=[beginning]
            ),
        ]
    )
