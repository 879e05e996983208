"""Text to token ids and back: a checkpoint's tokenizer.json, chat template and end-of-text ids.

`TokenStream` turns ids into text as they come, so that what it has given out is at any time a beginning of
what decoding all ids at once gives. Knows text and ids; knows no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from petalite.errors import InvalidArgument, InvalidCheckpoint, UnsupportedModel
from petalite.model.chat import ChatTemplate
from petalite.model.checkpoint import Checkpoint

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_CONTEXT_TOKENS = 8  # enough for any decoder to know what it stands after
_MAX_FILE_BYTES = 256 << 20
_MAX_TEMPLATE_BYTES = 1 << 20


class Tokenizer:
    """A checkpoint's tokenizer. Make one with `load_tokenizer`."""

    def __init__(
        self, raw: RawTokenizer, *, eos_ids: frozenset[int], template: ChatTemplate | None = None
    ) -> None:
        raw.no_truncation()  # the file may ask for both, for training
        raw.no_padding()
        self._raw = raw
        self._template = template
        self.eos_ids = eos_ids
        added: dict[int, AddedToken] = raw.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        # A decoder that joins <0xNN> tokens decides over a whole run of them whether they are text.
        self._has_byte_tokens = raw.decoder is not None and b"ByteFallback" in raw.decoder.__getstate__()

    @property
    def vocab_size(self) -> int:
        """How many ids there are; the model's embedding may have rows for more."""
        return self._raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Plain text, with whatever the model wants before it (a beginning-of-text token, mostly)."""
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Messages such as {"role": "user", "content": "Hello"}, up to where the assistant is to speak.

        Raises InvalidArgument where the checkpoint has no chat template or its template refuses the messages.
        """
        if self._template is None:
            raise InvalidArgument("this model has no chat template; give it a plain text to go on from")
        # The template writes the special tokens itself.
        return self._ids(self._template.render(messages), add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens have none."""
        listed = list(ids)
        try:
            return self._raw.decode(listed, skip_special_tokens=True)
        except BaseException as error:
            _refuse(error, "these tokens have no text in the checkpoint's tokenizer.json")
            raise

    def stream(self, prompt_ids: Sequence[int] = ()) -> TokenStream:
        """A stream for what follows `prompt_ids`."""
        return TokenStream(self, prompt_ids)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self._raw.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
            raise InvalidArgument(f"cannot tokenize this text: {error}") from error
        except BaseException as error:
            _refuse(error, "the checkpoint's tokenizer.json cannot tokenize this text")
            raise

    def has_same_ids(self, other: Tokenizer) -> bool:
        """Whether every id of either stands for the same piece of text in both."""
        vocabularies = [tokenizer._raw.get_vocab(with_added_tokens=True) for tokenizer in (self, other)]
        return bool(vocabularies[0] == vocabularies[1])

    def is_special(self, id: int) -> bool:
        """Whether `decode` leaves this id out."""
        return id in self._special_ids

    def may_change(self, id: int) -> bool:
        """Whether the text that ends in this id may still change with the next id."""
        return self._has_byte_tokens and bool(_BYTE_TOKEN.fullmatch(self._raw.id_to_token(id) or ""))


class TokenStream:
    """The text that follows a prompt, in pieces, as the ids come.

    The pieces so far are a beginning of `decode(prompt + ids)` less `decode(prompt)`, for every number of
    ids, and together with `flush` they are all of it. Half a character is held back until it is whole or a
    later id shows that it never will be.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        shown = [id for id in prompt_ids if not tokenizer.is_special(id)]
        # A run of byte tokens that the prompt ends in may go on, and is text or not as a whole.
        size = _CONTEXT_TOKENS
        while size < len(shown) and tokenizer.may_change(shown[-size]):
            size += 1
        self._settled = shown[-size:]  # ids whose text is out, the last few of them
        self._pending: list[int] = []  # ids of which some text is not out yet
        self._given = len(self._stable(self._settled))  # letters of settled and pending that are out

    def step(self, id: int) -> str:
        """The text that is certain now that `id` has come; often one word, sometimes none."""
        if self._tokenizer.is_special(id):
            return ""
        self._pending.append(id)
        if self._tokenizer.may_change(id):
            return ""
        text = self._tokenizer.decode(self._settled + self._pending)
        stable = text[:-1] if text.endswith(_UNFINISHED) else text
        piece = stable[self._given :]
        self._given = max(self._given, len(stable))
        if stable == text and piece:
            self._settled = (self._settled + self._pending)[-_CONTEXT_TOKENS:]
            self._pending = []
            self._given = len(self._tokenizer.decode(self._settled))
        return piece

    def flush(self) -> str:
        """What was held back, as it stands; the end of the text. The stream begins anew after it."""
        if not self._pending:
            return ""
        text = self._tokenizer.decode(self._settled + self._pending)
        piece = text[self._given :]
        self._settled = (self._settled + self._pending)[-_CONTEXT_TOKENS:]
        self._pending = []
        self._given = len(self._tokenizer.decode(self._settled))
        return piece

    def _stable(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids).removesuffix(_UNFINISHED)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises InvalidCheckpoint, UnsupportedModel."""
    path = checkpoint.file("tokenizer.json")
    if path is None:
        if checkpoint.file("tokenizer.model") is not None:
            raise UnsupportedModel(
                f"{checkpoint.folder} has tokenizer.model only; convert it to tokenizer.json "
                f"with the tokenizers library"
            )
        raise InvalidCheckpoint(f"{checkpoint.folder} has no tokenizer.json")
    raw = _read_tokenizer(path)
    config = checkpoint.read_json("tokenizer_config.json") or {}
    tokenizer = Tokenizer(
        raw,
        eos_ids=_eos_ids(checkpoint, raw, config),
        template=_chat_template(checkpoint, config),
    )
    highest = max(raw.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= checkpoint.config.vocab_size:
        raise InvalidCheckpoint(
            f"{path} has token ids up to {highest}, but the model's vocabulary is "
            f"{checkpoint.config.vocab_size}"
        )
    return tokenizer


def _refuse(error: BaseException, what: str) -> None:
    """Raise InvalidCheckpoint where the library ran into something: it raises plain Exception and, where its
    Rust code panics, a BaseException of a class that nobody can import.
    """
    if type(error) is Exception or type(error).__name__ == "PanicException":
        raise InvalidCheckpoint(f"{what}: {error}") from error


def _read_tokenizer(path: Path) -> RawTokenizer:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidCheckpoint(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
        return RawTokenizer.from_file(str(path))
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
    except BaseException as error:
        _refuse(error, f"{path} is not a tokenizer that can be read")
        raise


def _eos_ids(checkpoint: Checkpoint, raw: RawTokenizer, config: Mapping[str, Any]) -> frozenset[int]:
    """Every id that ends a text: generation_config.json's, else config.json's; and the tokenizer's own."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        listed = (checkpoint.read_json(name) or {}).get("eos_token_id")
        ids = listed if isinstance(listed, list) else [listed]
        found |= {id for id in ids if isinstance(id, int) and not isinstance(id, bool) and id >= 0}
        if found:
            break
    try:
        own = raw.token_to_id(_token_text(config.get("eos_token")))
    except UnicodeEncodeError:  # a lone surrogate, which is no token's
        own = None
    return frozenset(found if own is None else found | {own})


def _token_text(token: Any) -> str:
    """A special token of tokenizer_config.json: a string, or an object with its `content`; "" if there is
    none.
    """
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _chat_template(checkpoint: Checkpoint, config: Mapping[str, Any]) -> ChatTemplate | None:
    """chat_template.jinja, else the `chat_template` of tokenizer_config.json: a text, or a list of named
    ones.
    """
    path = checkpoint.file("chat_template.jinja")
    template: Any = config.get("chat_template")
    if path is not None:
        try:
            if path.stat().st_size > _MAX_TEMPLATE_BYTES:
                raise InvalidCheckpoint(f"{path} is larger than {_MAX_TEMPLATE_BYTES >> 20} MiB")
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidCheckpoint(f"cannot read {path}: {error}") from error
    if isinstance(template, list):
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if not isinstance(template, str):
        return None
    tokens = {
        name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    return ChatTemplate(template, tokens)
