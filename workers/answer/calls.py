"""Tool calls in JSON, read as they are written: `{"name": …, "arguments": {…}}`, one or a list of them.

A call's name is told as soon as it is known, its arguments as they come. A call spelt in any other way (arguments
first, arguments in a string, more fields) is told when it is whole.
"""

import re
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
