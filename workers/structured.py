"""What an answer must match, as far as it can be checked without compiling it; both engines alike."""

from typing import Any

import msgspec

from planes.wire.errors import UNUSABLE_GRAMMAR, InvalidRequest
from planes.wire.frames import StructuredOutput
from planes.wire.unreadable import UNREADABLE

MAX_CHARACTERS = 256 << 10
MAX_DEPTH = 64
"""Of objects and arrays in one another; xgrammar's and vLLM's own limits are higher."""


def check_structured(structured: StructuredOutput) -> None:
    """What only a grammar's compiler can tell comes later.  Raises:  InvalidRequest."""
    given = {name: value for name in structured.__struct_fields__ if (value := getattr(structured, name))}
    if len(given) != 1:
        names = ", ".join(given) or "none"
        raise unusable(f"what the answer must match is said {len(given)} times ({names}); once is needed")
    ((name, value),) = given.items()
    size = len(value) if isinstance(value, str) else sum(len(text) + 1 for text in value)
    if size > MAX_CHARACTERS:
        raise unusable(f"{name} has {size} characters; {MAX_CHARACTERS} are possible")
    if name == "regex" and "\x00" in value:
        raise unusable("regex has a NUL character")
    if name in ("json_schema", "structural_tag"):
        _check_json(name, value)


def _check_json(name: str, text: str) -> None:
    try:
        value = msgspec.json.decode(text)
    except UNREADABLE as exc:
        raise unusable(f"{name} is no JSON that can be read: {exc}") from exc
    if not isinstance(value, dict):
        raise unusable(f"{name} is no JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise unusable(f"{name} is nested more than {MAX_DEPTH} levels deep")


def unusable(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="response_format", code=UNUSABLE_GRAMMAR)
