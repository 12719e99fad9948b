"""OpenAI's completions: text alone."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from planes.wire.frames import Format, Sampling, Usage
from workers.answer.detokenizer import Vocabulary
from workers.answer.dialects.base import Ending, FinishedChoice, TokenNote
from workers.answer.dialects.openai import OpenAiDialect, encode, finite, usage_of
from workers.answer.parts import Content, Part
from workers.engine.base import TokenLogprob


class CompletionDialect(OpenAiDialect):
    """A completion, or its chunks."""

    has_prompt_in_choice = True

    def __init__(
        self, layout: Format, sampling: Sampling, vocabulary: Vocabulary, prompt: npt.NDArray[np.uint32]
    ) -> None:
        super().__init__(layout, sampling, vocabulary, prompt, kind="text_completion")
        self._num_logprobs = sampling.logprobs
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
        if logprobs is not None and self._layout.echo and choice.prompt_logprobs:
            of_prompt = self._prompt_logprobs(choice.prompt_logprobs)
            logprobs = {name: of_prompt[name] + values for name, values in logprobs.items()}
        text = self._layout.echo + choice.text
        written = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.ending.finish}
        if self._layout.has_token_ids:
            written |= {"token_ids": choice.tokens, "prompt_token_ids": self._prompt.tolist()}
        if choice.prompt_logprobs:
            written["prompt_logprobs"] = self._ranked(choice.prompt_logprobs)
        return written

    def _prompt_logprobs(self, logprobs: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Of the echoed prompt; its first token follows nothing and has none."""
        shown = [logprob and replace(logprob, top=logprob.top[: self._num_logprobs]) for logprob in logprobs]
        tokens = self._prompt.tolist()
        detokenizer = self._vocabulary.detokenizer(())
        offsets = list(accumulate([len(detokenizer.advance(token)) for token in tokens[:-1]], initial=0))
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [None if logprob is None else finite(logprob.logprob) for logprob in shown],
            "top_logprobs": [None if logprob is None else self._alternatives(logprob) for logprob in shown],
            "text_offset": offsets,
        }

    def _logprobs(self, notes: Sequence[TokenNote]) -> dict[str, list[Any]]:
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
