"""Tool calls in JSON, read as they are written: `{"name": …, "arguments": {…}}`, one or a list of them.

A call's name is told as soon as it is known, its arguments as they come. A call spelt in any other way (arguments
first, arguments in a string, more fields) is told when it is whole.

A parser may tell of one call amid another one. `Turns` puts its parts in order for dialects that can only say one thing
after the other.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from planes.wire.unreadable import UNREADABLE
from workers.answer.parts import CallArguments, CallStart, Part

_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MAX_HEAD_CHARS: Final = 2048
"""A call whose arguments have not begun by then is read when it is whole."""


class JsonExtent:
    """Finds where a JSON object or list ends, without building it."""

    __slots__ = ("_depth", "_is_escaped", "_is_string")

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = self._is_escaped = False

    @property
    def is_open(self) -> bool:
        """Whether a bracket or a string has begun and not ended."""
        return self._is_string or self._depth > 0

    def advance(self, text: str, start: int = 0) -> int | None:
        """The place behind the value's end, if it is in text[start:]."""
        for place in range(start, len(text)):
            char = text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                if char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._is_string = False
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


class CallReader:
    """Reads one call, which begins with a brace. index: its place among the choice's calls."""

    __slots__ = ("_arguments", "_extent", "_index", "_text", "is_over", "is_told")

    def __init__(self, index: int) -> None:
        self._index = index
        self._text = ""
        """All of the call so far, as long as nothing has been told of it."""
        self._extent = JsonExtent()
        """Of the call."""
        self._arguments: JsonExtent | None = None
        """Of its arguments, once they are being told."""
        self.is_told = False
        """Whether the client knows of the call."""
        self.is_over = False

    def advance(self, text: str) -> tuple[list[Part], str]:
        """Returns:  what is told now, and what stands behind the call's end."""
        end = self._extent.advance(text)
        self.is_over = end is not None
        inside, rest = (text, "") if end is None else (text[:end], text[end:])
        if self.is_told:
            return list(self._more(inside)), rest
        self._text += inside
        parts: list[Part] = []
        if len(self._text) <= _MAX_HEAD_CHARS and (head := _HEAD.match(self._text)):
            parts = list(self._begin(head))
        elif self.is_over:
            parts = self._whole()
        return parts, rest

    def untold(self) -> str:
        """The text that turned out to be no call, or is cut off before it is one; "" if it has been told."""
        return "" if self.is_told else self._text

    def _begin(self, head: re.Match[str]) -> Iterator[Part]:
        try:
            name = msgspec.json.decode(head[1], type=str)
        except UNREADABLE:
            return
        self.is_told = True
        yield CallStart(self._index, name)
        self._arguments = JsonExtent()
        text, self._text = self._text[head.end() :], ""
        yield from self._more(text)

    def _more(self, text: str) -> Iterator[Part]:
        if self._arguments is None:
            return
        end = self._arguments.advance(text)
        if end is not None:
            self._arguments = None
        if told := text[:end]:
            yield CallArguments(self._index, told)

    def _whole(self) -> list[Part]:
        """Of a call that has been read to its end."""
        try:
            call = msgspec.json.decode(self._text, type=dict[str, Any])
        except UNREADABLE:
            return []
        name = call.get("name")
        if not isinstance(name, str):
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        self.is_told = True
        text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        return [CallStart(self._index, name), CallArguments(self._index, text)]


class Turns:
    """Puts parts in order: all of a call's arguments follow its start, and what comes amid them waits.

    A call's turn is over when its arguments have begun, leave no bracket and no string open, and something else comes;
    at the latest with the answer. Arguments of a call whose turn is over are left out.
    """

    def __init__(self) -> None:
        self._turns = deque([_Turn(None)])
        """The first has it; the others wait."""
        self._calls: dict[int, _Turn] = {}
        """Those of calls, by the call's index."""

    def advance(self, part: Part) -> list[Part]:
        """Returns:  what can be told now."""
        turn = self._turn_of(part)
        if turn is None:
            return []
        turn.read(part)
        if turn is self._turns[0]:
            return [part]
        turn.waiting.append(part)
        told: list[Part] = []
        while self._turns[0] is not turn and self._turns[0].is_over:
            told += self._next()
        return told

    def finish(self) -> list[Part]:
        """The answer has ended: nothing waits any longer."""
        return [part for turn in self._turns for part in turn.waiting]

    def _next(self) -> list[Part]:
        """The first turn is over. Returns:  what has waited for the next one."""
        over, turn = self._turns.popleft(), self._turns[0]
        if over.call is not None:
            del self._calls[over.call]
        waiting, turn.waiting = turn.waiting, []
        return waiting

    def _turn_of(self, part: Part) -> "_Turn | None":
        """None: it is over."""
        if isinstance(part, CallArguments):
            return self._calls.get(part.index)
        if isinstance(part, CallStart):
            turn = self._calls[part.index] = _Turn(part.index)
        elif (turn := self._turns[-1]).call is None:
            return turn
        else:
            turn = _Turn(None)
        self._turns.append(turn)
        return turn


class _Turn:
    """Of a call, or of what is said between two (`call` is None)."""

    __slots__ = ("_arguments", "_has_begun", "_is_whole", "call", "waiting")

    def __init__(self, call: int | None) -> None:
        self.call = call
        self.waiting: list[Part] = []
        """Told to nobody yet."""
        self._arguments = JsonExtent()
        self._has_begun = self._is_whole = False

    @property
    def is_over(self) -> bool:
        """Whether it can end here."""
        return self.call is None or (self._has_begun and not self._arguments.is_open)

    def read(self, part: Part) -> None:
        if isinstance(part, CallArguments) and not self._is_whole:
            self._has_begun = self._has_begun or not part.text.isspace()
            self._is_whole = self._arguments.advance(part.text) is not None
