"""Conversations and texts that gateway and worker each turn into tokens, to find out whether both do it alike.

The gateway renders and tokenizes with code of its own, the worker with that of the model's makers, if it has it. Only
what is the same on both sides is compared: the same inputs here, the same instant for templates that tell the date.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

from planes.wire.blocks import Tokens

NOW: Final = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
"""What templates that ask are told."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One conversation. is_reply: the template's `add_generation_prompt`."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    is_reply: bool = True


_TEXT: Final = (
    "Prüfung: 1234567890, \"quoted\" 'text' & <tags>;\n\n\tcode(x) == [1, 2] \u4f60\u597d \U0001f980  two  spaces "
)
_SYSTEM: Final = {"role": "system", "content": "Answer briefly."}
_ASKED: Final = {"role": "user", "content": _TEXT}
_SAID: Final = {"role": "assistant", "content": "It is sunny.\n"}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a <city>.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL: Final = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Z\u00fcrich"}}}
    ],
}
_RESULT: Final = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"sun": true}'}

CONVERSATIONS: Final = (
    Probe((_ASKED,)),
    Probe((_SYSTEM, _ASKED)),
    Probe((_SYSTEM, _ASKED, _SAID, _ASKED)),
    Probe((_ASKED, _SAID), is_reply=False),
    Probe((_SYSTEM, _ASKED), (_TOOL,)),
    Probe((_ASKED, _CALL, _RESULT), (_TOOL,)),
)
TEXTS: Final = (_TEXT, "Once upon a time")
EDITION: Final = "1"
"""Of the probes: another one whenever they change. Digests of different editions say nothing of each other."""


def digest(
    chat: Callable[[Probe], Sequence[int] | Tokens | None], text: Callable[[str], Sequence[int] | Tokens]
) -> str:
    """Of all tokens: the edition, a colon, 32 hex digits.

    Args:  chat: a conversation's tokens; None: the template refuses it.  text: those of a raw prompt.
    """
    found = hashlib.sha256()
    for tokens in (*map(chat, CONVERSATIONS), *map(text, TEXTS)):
        packed = b"refused" if tokens is None else np.asarray(tokens, dtype="<u4").tobytes()
        found.update(len(packed).to_bytes(8, "little") + packed)
    return f"{EDITION}:{found.hexdigest()[:32]}"


def edition_of(told: str) -> str:
    return told.partition(":")[0]


def differ(one: str, other: str) -> bool:
    """Whether two digests of one edition are unlike. Unknown ones, "", are like any."""
    return bool(one and other) and edition_of(one) == edition_of(other) and one != other
