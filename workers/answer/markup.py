"""Thoughts and tool calls in an answer's text: what many models are taught to write, read one token at a time.

| what          | the text                                                          | `Parsing.tool_choice`   |
|---------------|-------------------------------------------------------------------|-------------------------|
| thoughts      | `<think>…</think>`, at the beginning                              | any                     |
| calls         | `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Hermes)   | auto                    |
| forced calls  | `[{"name": …, "parameters": {…}}, …]`, by the answer's constraint | required                |
| a forced call | `{…}`: the arguments alone, by the answer's constraint            | `function:NAME`         |

Nothing is lost: a tag that never ends, or holds no call, is text of the answer.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from planes.wire.frames import Parsing
from workers.answer.calls import CallReader
from workers.answer.parts import AnswerParser, CallArguments, CallStart, Content, Part, Reasoning

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
TAGS: Final = (_THINK, _END_THINK, _CALL, _END_CALL)
NAMED: Final = "function:"
"""Goes before the one tool that must be called."""


class _Reader(Protocol):
    """Reads what follows the thoughts."""

    def advance(self, text: str) -> list[Part]: ...
    def finish(self) -> list[Part]: ...


class MarkupParser:
    """One choice. is_thinking: whether its prompt has opened the thoughts already."""

    def __init__(self, parsing: Parsing, *, is_thinking: bool = False) -> None:
        self._reader = reader_of(parsing)
        self._thoughts = _Thoughts(is_thinking=is_thinking) if parsing.has_reasoning else None
        self.reasoning_tokens = 0

    def advance(self, text: str, token: int) -> Sequence[Part]:
        del token
        if self._thoughts is None:
            return self._reader.advance(text)
        was_thinking = self._thoughts.is_thinking
        parts, rest = self._thoughts.advance(text)
        self.reasoning_tokens += was_thinking or self._thoughts.is_thinking
        if self._thoughts.is_over:
            self._thoughts = None
        return [*parts, *self._reader.advance(rest)] if rest else parts

    def finish(self, text: str) -> Sequence[Part]:
        parts = list(self.advance(text, -1)) if text else []
        if self._thoughts is not None:
            last, rest = self._thoughts.finish()
            parts += last
            parts += self._reader.advance(rest)
        return [*parts, *self._reader.finish()]


def reader_of(parsing: Parsing) -> _Reader:
    """What reads the answer's calls."""
    if not parsing.tools or parsing.tool_choice == "none":
        return _Text()
    if parsing.tool_choice.startswith(NAMED):
        return _Arguments(parsing.tool_choice.removeprefix(NAMED))
    if parsing.tool_choice == "required":
        return _CallList(is_parallel=parsing.is_parallel)
    return _TaggedCalls(is_parallel=parsing.is_parallel)


def markup_parser(parsing: Parsing, *, prompt_end: str) -> Callable[[], AnswerParser]:
    """Makes a parser for each choice.  prompt_end: the prompt's last words."""
    is_thinking = prompt_end.rstrip().endswith(_THINK)
    return lambda: MarkupParser(parsing, is_thinking=is_thinking)


class _Thoughts:
    """They come first or not at all."""

    def __init__(self, *, is_thinking: bool) -> None:
        self.is_thinking = is_thinking
        self.is_over = False
        self._held = ""
        self._has_begun = False
        """Whether a thought has been told; blanks before the first are left out."""
        self._has_ended = False

    def advance(self, text: str) -> tuple[list[Part], str]:
        """Returns:  thoughts, and what stands behind them."""
        if self._has_ended:
            return [], self._after(text)
        held = self._held + text
        if not self.is_thinking:
            start = held.lstrip()
            if len(start) < len(_THINK) and _THINK.startswith(start):
                self._held = held
                return [], ""
            if not start.startswith(_THINK):
                self.is_over = True
                return [], held
            self.is_thinking = True
            held = start[len(_THINK) :]
        thought, tag, rest = held.partition(_END_THINK)
        free = thought if tag else held[: len(held) - _overlap(held, _END_THINK)]
        told = free.rstrip()
        if tag:
            self.is_thinking = False
            self._has_ended = True
            parts, rest = self._told(told), self._after(rest)
            return parts, rest
        self._held = held[len(told) :]
        return self._told(told), ""

    def _after(self, text: str) -> str:
        """The answer begins behind the empty lines that follow the thoughts."""
        rest = text.lstrip("\n")
        self.is_over = bool(rest)
        self._held = ""
        return rest

    def finish(self) -> tuple[list[Part], str]:
        held, self._held, self.is_over = self._held, "", True
        return (self._told(held), "") if self.is_thinking else ([], held)

    def _told(self, thought: str) -> list[Part]:
        if not self._has_begun:
            thought = thought.lstrip("\n")
        self._has_begun = self._has_begun or bool(thought)
        return [Reasoning(thought)] if thought else []


class _Text:
    """No calls are looked for."""

    def advance(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


class _Arguments:
    """The whole text is one call's arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def advance(self, text: str) -> list[Part]:
        if not text:
            return []
        start: list[Part] = [] if self._has_begun else [CallStart(0, self._name)]
        self._has_begun = True
        return [*start, CallArguments(0, text)]

    def finish(self) -> list[Part]:
        return []


class _CallList:
    """The whole text is a list of calls."""

    def __init__(self, *, is_parallel: bool) -> None:
        self._is_parallel = is_parallel
        self._num_calls = 0
        self._call: CallReader | None = None

    def advance(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            if self._call is None:
                start = text.find("{")
                if start < 0:
                    return parts  # brackets, commas and blanks
                text = text[start:]
                self._call = CallReader(self._num_calls)
            told, text = self._call.advance(text)
            if self._num_calls == 0 or self._is_parallel:
                parts += told
            if self._call.is_over:
                self._num_calls += self._call.is_told
                self._call = None
        return parts

    def finish(self) -> list[Part]:
        held = "" if self._call is None else self._call.untold()
        return [Content(held)] if held else []


class _TaggedCalls:
    """Calls between tags, amid text. Blanks around a call are left out."""

    def __init__(self, *, is_parallel: bool) -> None:
        self._is_parallel = is_parallel
        self._num_calls = 0
        self._held = ""
        """The beginning of a tag, perhaps, and blanks."""
        self._tagged = ""
        """A tag and the blanks around it, until the call behind it is told."""
        self._call: CallReader | None = None
        self._is_closing = False
        """A call has ended and its closing tag has not come."""
        self._is_after_call = False
        """Nothing but blanks has followed a call."""

    def advance(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            if self._is_closing:
                text = self._close(text)
            elif self._call is not None:
                text = self._inside(self._call, text, parts)
            elif self._tagged:
                text = self._begin(text, parts)
            else:
                text = self._outside(text, parts)
        return parts

    def finish(self) -> list[Part]:
        if self._is_closing:
            return []
        held = self._held + self._tagged + ("" if self._call is None else self._call.untold())
        return [Content(held)] if held else []

    def _outside(self, text: str, parts: list[Part]) -> str:
        held = self._held + text
        if self._is_after_call:
            held = held.lstrip()
        before, tag, rest = held.partition(_CALL)
        free = before if tag else held[: len(held) - _overlap(held, _CALL)]
        told = free.rstrip()
        if told:
            parts.append(Content(told))
            self._is_after_call = False
        if not tag:
            self._held = held[len(told) :]
            return ""
        self._held, self._tagged = "", before[len(told) :] + tag
        return rest

    def _begin(self, text: str, parts: list[Part]) -> str:
        """The tag has come; a call begins with a brace, and blanks may stand before it."""
        start = text.lstrip()
        self._tagged += text[: len(text) - len(start)]
        if start.startswith("{"):
            self._call = CallReader(self._num_calls)
        elif start:
            self._no_call(self._tagged, parts)
        return start

    def _inside(self, call: CallReader, text: str, parts: list[Part]) -> str:
        told, rest = call.advance(text)
        if self._num_calls == 0 or self._is_parallel:
            parts += told
        if call.is_told:
            self._tagged = ""
        if call.is_over:
            self._call = None
            self._is_closing = call.is_told
            if call.is_told:
                self._num_calls += 1
            else:
                self._no_call(self._tagged + call.untold(), parts)
        return rest

    def _close(self, text: str) -> str:
        """Leave out all up to the closing tag; or to the next opening one, for a model that forgot it."""
        held = self._held + text
        ends = [(place, tag) for tag in (_END_CALL, _CALL) if (place := held.find(tag)) >= 0]
        if not ends:
            self._held = held[len(held) - max(_overlap(held, _END_CALL), _overlap(held, _CALL)) :]
            return ""
        place, tag = min(ends)
        self._held, self._is_closing, self._is_after_call = "", False, True
        return held[place + len(tag) :] if tag == _END_CALL else held[place:]

    def _no_call(self, text: str, parts: list[Part]) -> None:
        """What stood behind the tag is text, the tag too."""
        parts.append(Content(text))
        self._tagged, self._is_after_call = "", False


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`, and not all of it."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[len(text) - length :]):
            return length
    return 0
