"""What an answer consists of, before any dialect has words for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thoughts."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool is called.  index: of the call in its choice, from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text; the call has started."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class AnswerParser(Protocol):
    """Reads one choice's text as parts. What it has said after k tokens depends on those tokens alone."""

    @property
    def reasoning_tokens(self) -> int:
        """How many of the tokens were thoughts."""

    def advance(self, text: str, token: int) -> Sequence[Part]:
        """Take the text that became known with `token`; it may be empty, or reach back to earlier tokens."""

    def finish(self, text: str) -> Sequence[Part]:
        """The text has ended, with these last words that had been held back."""


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same with texts of one kind that follow each other as one."""
    whole: list[Part] = []
    texts: list[str] = []
    for part in parts:
        last = whole[-1] if whole else None
        if isinstance(part, CallStart) or type(last) is not type(part) or _call_of(last) != _call_of(part):
            _join(whole, texts)
            whole.append(part)
            texts = [] if isinstance(part, CallStart) else [part.text]
        else:
            texts.append(part.text)
    _join(whole, texts)
    return whole


def _join(whole: list[Part], texts: list[str]) -> None:
    if len(texts) > 1 and not isinstance(whole[-1], CallStart):
        whole[-1] = replace(whole[-1], text="".join(texts))


def _call_of(part: Part | None) -> int | None:
    return part.index if isinstance(part, CallArguments) else None
