"""Logging of every process of ours: event names with key=value fields, one line an event, on standard error."""

import logging
import re
import sys
import time
from collections.abc import Callable

import structlog

LEVELS = ("debug", "info", "warning", "error")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of a line: a terminal would obey."""
_QUOTED = re.compile(rf'[\s="\\]|{_UNPRINTABLE.pattern}')


def configure(level: str = "info", *, as_json: bool = False) -> None:
    """Set up structlog for this process. Prompts, answers and token ids are never logged, only their lengths."""
    renderers: list[structlog.typing.Processor] = [Logfmt()]
    if as_json:
        renderers = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=[structlog.processors.format_exc_info, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # prints a line and its end in one write
        cache_logger_on_first_use=True,
    )


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
            if value is True:
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
    return f'"{_UNPRINTABLE.sub(_escaped, escaped)}"'


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
