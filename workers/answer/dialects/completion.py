"""OpenAI's completions: text alone."""

from collections.abc import Sequence
from typing import Any

from planes.wire.frames import Format, Usage
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Ending, FinishedChoice, TokenNote
from workers.answer.dialects.openai import OpenAiDialect, encode, finite, usage_of
from workers.answer.parts import Content, Part
from workers.engine.base import TokenLogprob


class CompletionDialect(OpenAiDialect):
    """A completion, or its chunks."""

    def __init__(self, layout: Format, num_choices: int, vocabulary: Vocabulary) -> None:
        super().__init__(layout, num_choices, vocabulary, kind="text_completion")
        self._text_starts = [start + b'"text":' for start in self._starts]
        self._text_end = b',"logprobs":null,"finish_reason":null' + self._end

    def opening(self, index: int) -> bytes:
        """The prompt, if the client wants it back."""
        return self.text(index, self._layout.echo) if self._layout.echo else b""

    def text(self, index: int, text: str) -> bytes:
        return self._text_starts[index] + encode(text) + self._text_end

    def token(self, index: int, text: str, note: TokenNote) -> bytes:
        logprobs = b',"logprobs":' + encode(self._logprobs([note])) + b',"finish_reason":null'
        return self._text_starts[index] + encode(text) + logprobs + self._end

    def part(self, index: int, part: Part) -> bytes:
        """Nothing but text is looked for in a completion."""
        return self.text(index, part.text) if isinstance(part, Content) else b""

    def closing(self, index: int, ending: Ending) -> bytes:
        return self._starts[index] + b'"text":"","logprobs":null,"finish_reason":' + encode(ending.finish) + self._end

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        written = [self._choice(choice) for choice in choices]
        return encode(self._identity | {"choices": written, "usage": usage_of(usage)})

    def _choice(self, choice: FinishedChoice) -> dict[str, Any]:
        logprobs = None if choice.notes is None else self._logprobs(choice.notes)
        text = self._layout.echo + choice.text
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.ending.finish}

    def _logprobs(self, notes: Sequence[TokenNote]) -> dict[str, Any]:
        return {
            "tokens": [self._name(note.logprob.token) for note in notes],
            "token_logprobs": [finite(note.logprob.logprob) for note in notes],
            "top_logprobs": [self._alternatives(note.logprob) for note in notes],
            "text_offset": [len(self._layout.echo) + note.text_offset for note in notes],
        }

    def _alternatives(self, logprob: TokenLogprob) -> dict[str, float]:
        """Completions count the token itself among its alternatives, so there may be one more than asked for."""
        every = (*logprob.top, (logprob.token, logprob.logprob))
        return {self._name(token): finite(value) for token, value in every}
