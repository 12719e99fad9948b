"""How a response ends: its last event, taken apart once, and what stands in for the answer of one that failed."""

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from app.openai.errors import code_of
from app.openai.errors import response as error_response
from planes.wire.errors import HeadraceError, InvalidRequest
from planes.wire.frames import Format
from planes.wire.response_object import response_event, response_object

_RESPONSE: Final = b',"response":'
_NUMBER: Final = re.compile(rb'"sequence_number":(\d+)')


@dataclass(frozen=True, slots=True)
class Ending:
    """before: the events before the last one.  last: the last one.  body: the response in it."""

    before: bytes
    last: bytes
    body: bytes


def taken_apart(payload: bytes) -> Ending:
    """The end of a stream, whose last event tells the whole response.

    No line break stands within an event's JSON, and nothing before its response says `"response":`.
    """
    cut = payload[:-2].rfind(b"\n\n")
    cut = cut + 2 if cut >= 0 else 0
    last = payload[cut:]
    start = last.index(_RESPONSE) + len(_RESPONSE)
    return Ending(payload[:cut], last, last[start:-3])  # } \n \n


def next_number(payload: bytes) -> int:
    """Of the event that may follow the last one in these bytes, which are whole events."""
    numbers: list[bytes] = _NUMBER.findall(payload[payload[:-2].rfind(b"\n\n") + 1 :])
    return int(numbers[0]) + 1 if numbers else 0


def failed_body(layout: Format, exc: BaseException) -> bytes:
    """The response of a request that ended with an error."""
    told = msgspec.json.decode(error_response(exc).body)["error"]
    return response_object(layout, "failed", error={"code": _word(exc), "message": told["message"]})


def failed_event(layout: Format, exc: BaseException, number: int) -> bytes:
    """The last event of a stream that ended with an error."""
    return response_event("response.failed", number, failed_body(layout, exc))


def with_status(body: bytes, status: str, error: dict[str, str] | None = None) -> bytes:
    """The same response in another state."""
    fields: dict[str, msgspec.Raw] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    fields["status"] = msgspec.Raw(msgspec.json.encode(status))
    if error is not None:
        fields["error"] = msgspec.Raw(msgspec.json.encode(error))
    return msgspec.json.encode(fields)


def _word(exc: BaseException) -> str:
    """One of the few that OpenAI's response has for what went wrong; the message says the rest."""
    if isinstance(exc, InvalidRequest):
        return "invalid_prompt"
    is_limited = isinstance(exc, HeadraceError) and error_response(exc).status == 429
    return "rate_limit_exceeded" if is_limited and code_of(exc) else "server_error"
