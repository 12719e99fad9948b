"""Logging of every process of ours: event names with key=value fields, one line an event, on standard error."""

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from threading import Lock
from types import MappingProxyType
from typing import Any, Self, TextIO

import structlog

LEVELS = ("debug", "info", "warning", "error")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of a line: a terminal would obey."""
_QUOTED = re.compile(rf'[\s="\\]|{_UNPRINTABLE.pattern}')


def configure(
    level: str = "info",
    *,
    as_json: bool = False,
    lines: "LineWriter | None" = None,
    always: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Set up structlog for this process. Prompts, answers and token ids are never logged, only their lengths.

    lines: where lines go; None: each by itself to standard error.  always: fields that all lines end with.
    """
    renderers: list[structlog.typing.Processor] = [Logfmt()]
    if as_json:
        renderers = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.JSONRenderer(),
        ]
    file: Any = UnfailingFile(sys.stderr)
    if always:
        renderers.insert(0, lambda _, __, event: {**event, **always})
    structlog.configure(
        processors=[structlog.processors.format_exc_info, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # Prints a line and its end in one write.
        logger_factory=lambda *_: structlog.WriteLogger(file) if lines is None else lines,
        cache_logger_on_first_use=True,
    )


class UnfailingFile:
    """Where lines go. A disk that is full, or a reader who has gone, costs lines: nobody ends because of its log."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


class LineWriter:
    """Writes lines that only inform together: waking up whoever reads a log costs more than the line.

    On an event loop they wait for others, at most `patience_s`; a warning takes them along at once, and so does the end
    of a `with` block. What waits is lost if the process is killed.
    """

    def __init__(self, file: TextIO, *, patience_s: float = 0.05, max_lines: int = 256) -> None:
        self._file = UnfailingFile(file)
        self._patience_s = patience_s
        self._max_lines = max_lines
        self._lines: list[str] = []
        self._is_due = False
        """A timer will write what waits."""
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def info(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
        if not self._is_due or len(self._lines) >= self._max_lines:
            self._write_later()

    def error(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
        self.flush()

    debug = info
    warning = critical = exception = error

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            lines, self._lines = self._lines, []
            if lines:
                self._file.write("\n".join([*lines, ""]))
                self._file.flush()

    def _write_later(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # of a thread, or before the loop
            self.flush()
            return
        if self._is_due:
            self.flush()
        else:
            self._is_due = True
            loop.call_later(self._patience_s, self._on_time)

    def _on_time(self) -> None:
        self._is_due = False
        self.flush()


class Logfmt:
    """`ts=… level=… event=…` and the fields: what structlog's own stamper and renderer write, at a third of their cost.

    A request ends with a line, so the line is part of what a request costs.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._second = -1
        self._stamp = ""

    def __call__(self, _: object, level: str, event: structlog.typing.EventDict) -> str:
        now = self._clock()
        if int(now) != self._second:
            self._second = int(now)
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        words = [f"ts={self._stamp}.{int(now % 1 * 1e6):06d}Z level={level} event={_text(event.pop('event'))}"]
        for key, value in event.items():
            if type(value) is float or type(value) is int:  # most of a request's, and never to be quoted
                words.append(f"{key}={value}")
            elif value is True:
                words.append(key)
            elif value is False:
                words.append(f"{key}=false")
            else:
                words.append(f"{key}=" if value is None else f"{key}={_text(value)}")
        return " ".join(words)


def _text(value: object) -> str:
    text = str(value)
    if _QUOTED.search(text) is None:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{printable(escaped)}"'


def printable(text: str) -> str:
    """The text with everything in it escaped that a terminal would obey."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
