"""What becomes of one prompt: its tokens as they are chosen, their text, and when it is over."""

from __future__ import annotations

from petalite.client.generation import LENGTH, STOP, Generation
from petalite.client.options import Options
from petalite.client.sampling import Choice
from petalite.client.trace import Trace
from petalite.model.tokenizer import Tokenizer


class Reply:
    """Grows by `take`; ends by a stop id, a stop text, or whoever feeds it no more."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], options: Options) -> None:
        self.prompt_ids = prompt_ids
        self.chooser = options.chooser(len(prompt_ids))
        self.stop_ids = tokenizer.eos_ids | frozenset(options.stop_ids)
        self._options = options
        self._choices: list[Choice] = []
        self._stream = tokenizer.stream(prompt_ids)
        self._stops = options.stop_texts()
        self._text: list[str] = []

    @property
    def token_ids(self) -> list[int]:
        return [choice.token_id for choice in self._choices]

    @property
    def has_stopped(self) -> bool:
        return self._stops.found is not None or (
            bool(self._choices) and self._choices[-1].token_id in self.stop_ids
        )

    def take(self, choice: Choice) -> str:
        """The text that is certain now that this token has come."""
        self._choices.append(choice)
        if choice.token_id in self.stop_ids:
            return ""
        return self._put(self._stops.step(self._stream.step(choice.token_id)))

    def end(self) -> str:
        """The text that was held back; nothing comes any more."""
        return self._put(self._stops.step(self._stream.flush()) + self._stops.flush())

    def generation(self, trace: Trace) -> Generation:
        return Generation(
            text="".join(self._text),
            token_ids=self.token_ids,
            logprobs=[choice.logprob for choice in self._choices],
            finish_reason=STOP if self.has_stopped else LENGTH,
            trace=trace,
            alternatives=[choice.alternatives for choice in self._choices] if self._options.logprobs else [],
        )

    def _put(self, piece: str) -> str:
        self._text.append(piece)
        return piece
