"""What every dialect can say; one object for each answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from planes.wire.frames import FinishReason, Usage
from workers.answer.parts import CallArguments, CallStart, Content, Part, Reasoning
from workers.engine.base import TokenLogprob


@dataclass(frozen=True, slots=True)
class TokenNote:
    """What the answer says about one token: its log probability, and where its text begins in the answer's text."""

    logprob: TokenLogprob
    text_offset: int


@dataclass(frozen=True, slots=True)
class TokenNews:
    """What one event tells of its choice's tokens.

    tokens: those that no event before has told of, in order.  num_tokens: so far.
    """

    tokens: Sequence[int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Call:
    """One whole tool call.  arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a choice ended.  stop: the stop string that did it, or "".  has_calls: whether it called a tool."""

    finish: FinishReason
    stop: str = ""
    has_calls: bool = False


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """One whole choice of an answer that is not streamed.  parts: merged: no two texts of one kind in a row.

    tokens: all of them, if their ids are told.  prompt_logprobs: of the prompt's tokens, if they are told.
    """

    index: int
    parts: Sequence[Part]
    notes: Sequence[TokenNote] | None
    ending: Ending
    tokens: Sequence[int] = ()
    prompt_logprobs: Sequence[TokenLogprob | None] = ()

    @property
    def text(self) -> str:
        return "".join([part.text for part in self.parts if isinstance(part, Content)])

    @property
    def reasoning(self) -> str:
        return "".join([part.text for part in self.parts if isinstance(part, Reasoning)])

    def calls(self) -> list[Call]:
        names = {part.index: part.name for part in self.parts if isinstance(part, CallStart)}
        arguments = dict.fromkeys(names, "")
        for part in self.parts:
            if isinstance(part, CallArguments):
                arguments[part.index] += part.text
        return [Call(name, arguments[index]) for index, name in names.items()]


class Dialect(Protocol):
    """Writes one answer's bytes. A pure fold: it reads no clock and draws no random number, and may keep state.

    Streamed: `opening`, then `text`, `token` and `part`, then `closing` for each choice; in the end `last`, once.
    Whole: `body` alone.
    """

    def opening(self, index: int) -> bytes:
        """Goes before a choice's first token."""

    def text(self, index: int, text: str) -> bytes:
        """More of the answer's text. Most events are this one."""

    def token(self, index: int, text: str, note: TokenNote) -> bytes:
        """A token with its log probability; `text` may be empty, or reach back to earlier tokens."""

    def part(self, index: int, part: Part) -> bytes:
        """Anything, the answer's text too."""

    def closing(self, index: int, ending: Ending) -> bytes:
        """The choice has ended."""

    def last(self, usage: Usage) -> bytes:
        """What follows the last choice's closing."""

    def body(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        """The whole answer."""
