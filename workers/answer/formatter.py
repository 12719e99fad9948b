"""Tokens in, OpenAI bytes out: a fold over each choice's token sequence.

What has been written after k tokens depends on those tokens alone, not on how they came in: every token gives at most
one event, and nothing is held back that the tokens cannot give again. So a formatter that has folded the first k
tokens without writing (`fold`) goes on with exactly the bytes that an uninterrupted one would write. The log
probability of a token leaves with the token, though its text may still be held back, for the same reason.

A choice writes: opening event → one event per token that has news → held text → closing event.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from planes.wire.frames import FinishReason, Format, Sampling, Usage
from workers.answer.detokenizer import Detokenizer, Vocabulary
from workers.answer.dialects import dialect
from workers.answer.dialects.base import Dialect, Ending, FinishedChoice, TokenNews, TokenNote
from workers.answer.dialects.openai import OpenAiDialect
from workers.answer.parts import AnswerParser, CallStart, Content, Part, merged
from workers.answer.stop_strings import StopFinder
from workers.engine.base import EngineOutput, TokenLogprob

_CONTEXT_TOKENS = 8
"""At a prompt's end, for tokenizers whose text depends on what stands before."""
_NO_PROMPT: npt.NDArray[np.uint32] = np.empty(0, np.uint32)


class Formatter:
    """The answer to one request, as bytes for its client.

    Streamed: `feed` returns the events that are due, `finish` the last ones. Otherwise `feed` returns nothing and
    `finish` the whole body.
    """

    def __init__(
        self,
        layout: Format,
        sampling: Sampling,
        vocabulary: Vocabulary,
        *,
        end_tokens: frozenset[int] = frozenset(),
        prompt: npt.NDArray[np.uint32] = _NO_PROMPT,
        parser: Callable[[], AnswerParser] | None = None,
    ) -> None:
        """
        Args:  end_tokens: the model's end-of-sequence ids.  prompt: its tokens, shape (n,).  parser: makes one for each
        choice; None: all text is the answer's.
        """
        self._is_streaming = layout.is_streaming
        self._dialect = dialect(layout, sampling, vocabulary, prompt=prompt)
        has_news = layout.has_token_ids or layout.has_continuous_usage
        teller = self._dialect if has_news and isinstance(self._dialect, OpenAiDialect) else None
        context = prompt[-_CONTEXT_TOKENS:].tolist()
        self._is_stop_included = sampling.is_stop_included
        self._prompt_logprobs: Sequence[TokenLogprob | None] = ()
        self._has_logprobs = sampling.logprobs is not None
        self._end_tokens = end_tokens | frozenset(sampling.stop_token_ids)
        self._choices = [
            _Choice(
                index,
                self._dialect,
                vocabulary.detokenizer(context),
                sampling,
                parser=None if parser is None else parser(),
                teller=teller,
                is_streaming=layout.is_streaming,
            )
            for index in range(sampling.n)
        ]
        self._num_open = sampling.n

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.reasoning_tokens for choice in self._choices)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why choice 0 ended, once all choices have; None before."""
        return None if self._num_open else self._choices[0].finish

    def fold(self, tokens: Sequence[int], *, is_stopped: bool = False) -> None:
        """Take choice 0's first tokens, which the client has got already: nothing is written for them.

        is_stopped: the last of them ended the answer; `end` says so.
        """
        choice = self._choices[0]
        is_end_token = is_stopped and not self._is_stop_included
        # Nobody knows their log probabilities any more, but each of them had an event of its own.
        notes = [TokenLogprob(token, 0.0) for token in tokens] if self._has_logprobs and self._is_streaming else ()
        self._num_open -= choice.advance(tokens[:-1] if is_end_token else tokens, notes)
        if is_end_token:
            choice.count(tokens[-1])
        choice.take()

    def feed(self, output: EngineOutput) -> tuple[bytes, Sequence[int]]:
        """Take what one engine step produced for one choice.

        Returns:  the events due now, and the tokens that count: those after a stop string do not, and nothing does
        once the choice has ended.
        """
        choice = self._choices[output.index]
        if choice.finish is not None:
            return b"", ()
        before, tokens = choice.num_tokens, output.tokens
        if output.prompt_logprobs:
            self._prompt_logprobs = output.prompt_logprobs
        is_end_token = output.finish is FinishReason.STOP and self._is_unwritten(tokens)
        has_stopped = choice.advance(tokens[:-1] if is_end_token else tokens, output.logprobs)
        if has_stopped:
            choice.close()
        elif output.finish is not None:
            if is_end_token:
                choice.count(tokens[-1])
            choice.end(output.finish)
        self._num_open -= choice.finish is not None
        counted = choice.num_tokens - before
        return choice.take(), tokens if counted == len(tokens) else tokens[:counted]

    def end(self, finish: FinishReason) -> bytes:
        """End what `fold` left open: a resumed request that turns out to be complete."""
        for choice in self._choices:
            if choice.finish is None:
                choice.end(finish)
            else:
                choice.close()
        self._num_open = 0
        return b"".join(choice.take() for choice in self._choices)

    def finish(self, usage: Usage) -> bytes:
        """The last bytes of the answer, after every choice has ended."""
        if self._is_streaming:
            return self._dialect.last(usage)
        finished = [choice.finished(self._prompt_logprobs, has_notes=self._has_logprobs) for choice in self._choices]
        return self._dialect.body(finished, usage)

    def _is_unwritten(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these, with which the engine ended the choice, is no part of its text."""
        return bool(tokens) and not self._is_stop_included and tokens[-1] in self._end_tokens


class _Choice:
    """One choice: its tokens so far, and the events not yet taken."""

    __slots__ = (
        "_detokenizer",
        "_dialect",
        "_has_calls",
        "_index",
        "_is_open",
        "_is_streaming",
        "_min_tokens",
        "_notes",
        "_parser",
        "_parts",
        "_stops",
        "_teller",
        "_text_length",
        "_untold",
        "_written",
        "finish",
        "num_tokens",
    )

    def __init__(
        self,
        index: int,
        dialect: Dialect,
        detokenizer: Detokenizer,
        sampling: Sampling,
        *,
        parser: AnswerParser | None,
        teller: OpenAiDialect | None,
        is_streaming: bool,
    ) -> None:
        self.finish: FinishReason | None = None
        self.num_tokens = 0
        self._index = index
        self._dialect = dialect
        self._is_streaming = is_streaming
        self._detokenizer = detokenizer
        self._parser = parser
        self._stops = StopFinder(sampling.stop, is_kept=sampling.is_stop_included) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        self._is_open = False
        self._has_calls = False
        self._text_length = 0
        """Characters decoded, held ones included: where the next token's text begins."""
        self._teller = teller
        """Adds to each event what it tells of the tokens behind it; None: nothing."""
        self._untold: list[int] = []
        """Tokens that no event has told of; with `_teller` only."""
        self._written: list[bytes] = []
        self._parts: list[Part] = []
        self._notes: list[TokenNote] = []

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._parser is None else self._parser.reasoning_tokens

    def advance(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> bool:
        """Take tokens in order, up to the one that completes a stop string; tells whether one did.

        Args:  logprobs: one for each token, or none.
        """
        if tokens:
            self._open()
        for place, token in enumerate(tokens):
            self.num_tokens += 1
            if self._teller is not None:
                self._untold.append(token)
            text = self._detokenizer.advance(token)
            note = TokenNote(logprobs[place], self._text_length) if logprobs else None
            self._text_length += len(text)
            if text and self._stops is not None and self.num_tokens > self._min_tokens:
                text = self._stops.advance(text)
                if self._stops.found:
                    self.finish = FinishReason.STOP
            if self._parser is None:
                self._write(text, note)
            elif self.finish is None:
                self._write_parts(self._parser.advance(text, token), note)
            else:
                self._write_parts([*self._parser.advance(text, token), *self._parser.finish("")], note)
            if self.finish is not None:
                return True
        return False

    def count(self, token: int) -> None:
        """A token that ended the choice and is no part of its text."""
        self.num_tokens += 1
        if self._teller is not None:
            self._untold.append(token)

    def end(self, finish: FinishReason) -> None:
        """The engine ended the choice: let go of what is held."""
        self._open()
        self.finish = finish
        held = self._stops.flush() if self._stops is not None else ""
        text = held + self._detokenizer.flush()
        if self._parser is None:
            self._write(text, None)
        else:
            self._write_parts(self._parser.finish(text), None)
        self.close()

    def close(self) -> None:
        if self._is_streaming and self.finish is not None:
            self._put(self._dialect.closing(self._index, self._ending(self.finish)))

    def take(self) -> bytes:
        """Events written since the last call."""
        written = b"".join(self._written)
        self._written.clear()
        return written

    def finished(self, prompt_logprobs: Sequence[TokenLogprob | None], *, has_notes: bool) -> FinishedChoice:
        """The finished choice."""
        return FinishedChoice(
            self._index,
            merged(self._parts),
            self._notes if has_notes else None,
            self._ending(self.finish or FinishReason.LENGTH),
            tokens=self._untold,
            prompt_logprobs=prompt_logprobs,
        )

    def _ending(self, finish: FinishReason) -> Ending:
        return Ending(finish, self._stops.found if self._stops is not None else "", self._has_calls)

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            if self._is_streaming:
                self._put(self._dialect.opening(self._index))

    def _put(self, event: bytes) -> None:
        """One event, or several of a dialect that tells nothing of tokens."""
        if self._teller is not None and event:
            event = self._teller.told(self._index, event, TokenNews(self._untold, self.num_tokens))
            self._untold = []
        self._written.append(event)

    def _write(self, text: str, note: TokenNote | None) -> None:
        if not self._is_streaming:
            if text:
                self._parts.append(Content(text))
            if note is not None:
                self._notes.append(note)
        elif note is not None:
            self._put(self._dialect.token(self._index, text, note))
        elif text:
            event = self._dialect.text(self._index, text)
            if self._teller is None:
                self._written.append(event)  # the way that most tokens take: one call less
            else:
                self._put(event)

    def _write_parts(self, parts: Sequence[Part], note: TokenNote | None) -> None:
        """The log probability leaves with its token, whatever part the token belongs to."""
        if note is not None:
            self._write("", note)
        for part in parts:
            self._has_calls = self._has_calls or isinstance(part, CallStart)
            if self._is_streaming:
                self._put(self._dialect.part(self._index, part))
            else:
                self._parts.append(part)
