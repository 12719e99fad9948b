"""A line in front of a system prompt that is new in every request, and would keep all that follows from being cached.

Coding agents begin their system prompt with a line for their maker's billing, spelt as an HTTP header. It tells the
model nothing; the tokens after it are the same in every request, and nobody would find them cached.
"""

import re
from typing import Any, Final

_NONCE: Final = re.compile(r"\Ax-[a-z0-9-]*-header:[^\n]*\n?", re.IGNORECASE)


def without_nonce(messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The same conversation without such a line at the beginning of its first message, if that is a system prompt."""
    if not messages or messages[0]["role"] != "system":
        return messages
    content = messages[0]["content"]
    if not isinstance(content, str) or not (found := _NONCE.match(content)):
        return messages
    rest = content[found.end() :].lstrip("\n")
    return ({**messages[0], "content": rest}, *messages[1:]) if rest else messages[1:]
