"""OpenAI's response object and its events as JSON: the worker writes what it generates, the gateway what becomes of it
otherwise.
"""

from typing import Any

import msgspec

from planes.wire.frames import Format

_encode = msgspec.json.encode

FINAL = frozenset({"completed", "incomplete", "failed", "cancelled"})
"""States that a response stays in."""


def response_object(
    layout: Format,
    status: str,
    *,
    output: bytes = b"[]",
    usage: bytes = b"null",
    incomplete_reason: str | None = None,
    error: dict[str, Any] | None = None,
) -> bytes:
    """The whole response. What it repeats of the request is copied as it came.  Args:  output, usage: JSON."""
    details = b"null" if incomplete_reason is None else _encode({"reason": incomplete_reason})
    repeated = layout.repeated.removeprefix(b"{").removesuffix(b"}")
    return (
        b'{"id":%b,"object":"response","created_at":%d,"status":"%b","error":%b,"incomplete_details":%b,"model":%b,'
        b'"output":%b,"usage":%b%b%b}'
    ) % (
        _encode(layout.response_id),
        layout.created,
        status.encode(),
        _encode(error),
        details,
        _encode(layout.model),
        output,
        usage,
        b"," if repeated else b"",
        repeated,
    )


def event(kind: str, number: int, rest: bytes) -> bytes:
    """A server-sent event. Its JSON begins with type and number.  rest: the other fields, as JSON without braces."""
    name = kind.encode()
    return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (name, name, number, rest)


def response_event(kind: str, number: int, response: bytes) -> bytes:
    """An event that tells the whole response."""
    return event(kind, number, b'"response":' + response)


def item_id(prefix: str, response_id: str, ordinal: int) -> str:
    """Of an item of a response; `response_of` undoes it, so that whoever refers to an item need not say of what."""
    return f"{prefix}_{response_id.removeprefix('resp_')}_{ordinal}"


def response_of(item: str) -> str | None:
    """The id of the response that an item is of; None if it is none of ours."""
    parts = item.split("_")
    return f"resp_{parts[1]}" if len(parts) == 3 and all(parts) else None
