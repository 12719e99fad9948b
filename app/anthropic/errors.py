"""Errors in Anthropic's shape. The status is the one that clients of the other APIs get.

| status        | type                  |
|---------------|-----------------------|
| 400, 4xx      | invalid_request_error |
| 401           | authentication_error  |
| 403           | permission_error      |
| 404           | not_found_error       |
| 413           | request_too_large     |
| 429           | rate_limit_error      |
| 503           | overloaded_error      |
| 504           | timeout_error         |
| 5xx           | api_error             |
"""

from typing import Final, Literal

import msgspec

from app.openai import errors as openai_errors
from app.openai.errors import ErrorResponse

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetail(msgspec.Struct, frozen=True):
    """Anthropic's error object."""

    type: str
    message: str


class ErrorBody(msgspec.Struct, frozen=True):
    """What Anthropic wraps it in."""

    type: Literal["error"]
    error: ErrorDetail


def response(exc: BaseException) -> ErrorResponse:
    """The answer to a request that ended with `exc` before its first byte was sent."""
    known = openai_errors.response(exc)
    return ErrorResponse(known.status, msgspec.json.encode(_body(exc, known.status)), known.headers)


def sse_event(exc: BaseException) -> bytes:
    """The last event of a stream that ended with `exc`."""
    body = _body(exc, openai_errors.status_of(exc))
    return b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"


def _body(exc: BaseException, status: int) -> ErrorBody:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return ErrorBody(type="error", error=ErrorDetail(kind, openai_errors.message_of(exc)))
