"""How errors reach a client: the one table from `planes/wire/errors.py` to HTTP status, OpenAI's body and SSE event.

| error                                   | status              | type                                      |
|-----------------------------------------|---------------------|-------------------------------------------|
| InvalidRequest                          | 400, or by its code | invalid_request_error                     |
| … code invalid_api_key                  | 401                 | authentication_error                      |
| … code admin_only                       | 403                 | permission_error                          |
| … code model_not_found, not_found       | 404                 | invalid_request_error                     |
| … code method_not_allowed               | 405                 | invalid_request_error                     |
| … code request_timeout                  | 408                 | invalid_request_error                     |
| … code body_too_large                   | 413                 | invalid_request_error                     |
| … code unsupported_encoding             | 415                 | invalid_request_error                     |
| … code too_many_pipelined               | 429                 | invalid_request_error                     |
| … code head_too_large                   | 431                 | invalid_request_error                     |
| Rejected                                | 503, or by its code | server_overloaded                         |
| … code queue_full, slo_missed, concurrency_limit, worker_busy, rate_limit_exceeded | 429 | rate_limit_error |
| … code duplicate_request                | 409                 | server_overloaded                         |
| … code policy_failed, internal_error    | 500                 | server_overloaded                         |
| Expired                                 | 504                 | timeout_error                             |
| Interrupted                             | 502                 | server_error                              |
| any other HeadraceError                 | 500                 | server_error                              |
| any other exception                     | 500                 | server_error, without its message         |
"""

import math
from dataclasses import dataclass
from typing import Final

import msgspec

from planes.wire.errors import Expired, HeadraceError, Interrupted, InvalidRequest, Rejected

_STATUS_OF_INVALID: Final = {
    "invalid_api_key": 401,
    "admin_only": 403,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "body_too_large": 413,
    "unsupported_encoding": 415,
    "too_many_pipelined": 429,
    "head_too_large": 431,
}
_TYPE_OF_INVALID: Final = {"invalid_api_key": "authentication_error", "admin_only": "permission_error"}
_STATUS_OF_REJECTED: Final = {
    "queue_full": 429,
    "slo_missed": 429,
    "concurrency_limit": 429,
    "worker_busy": 429,
    "rate_limit_exceeded": 429,
    "duplicate_request": 409,
    "policy_failed": 500,
    "internal_error": 500,
}


_INTERNAL: Final = "The server had an internal error; it has been logged."


class ModelNotFound(InvalidRequest):
    """No worker serves this model."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model '{model[:200]}' does not exist; GET /v1/models lists those that do.", param="model"
        )


class BodyTooLarge(InvalidRequest):
    """The HTTP body is longer than the gateway reads."""

    code = "body_too_large"

    def __init__(self, num_bytes: int, limit: int) -> None:
        super().__init__(f"The request body has {num_bytes} bytes or more and the limit is {limit}.")


class UnsupportedEncoding(InvalidRequest):
    """The HTTP body is compressed, or otherwise not the JSON itself."""

    code = "unsupported_encoding"

    def __init__(self, encoding: str) -> None:
        super().__init__(
            f"The request body has content-encoding {encoding[:100]!r}; send it as it is, without that header."
        )


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """What OpenAI wraps it in."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """A whole HTTP answer. Header names are lower case."""

    status: int
    body: bytes
    headers: dict[str, str]


def response(exc: BaseException) -> ErrorResponse:
    """The answer to a request that ended with `exc` before its first byte was sent."""
    headers = {"content-type": "application/json"}
    status = status_of(exc)
    if isinstance(exc, Rejected) and exc.retry_after_s is not None:
        # Retry-After knows whole seconds only; the openai client prefers the finer header.
        headers["retry-after"] = str(max(1, math.ceil(exc.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(exc.retry_after_s * 1000)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorResponse(status, msgspec.json.encode(_body(exc)), headers)


def sse_event(exc: BaseException) -> bytes:
    """The last event of a stream that ended with `exc`."""
    return b"data: " + msgspec.json.encode(_body(exc)) + b"\n\n"


def code_of(exc: BaseException) -> str:
    """The label of an error in metrics and logs; the same word that the client reads."""
    return exc.code if isinstance(exc, HeadraceError) else HeadraceError.code


def message_of(exc: BaseException) -> str:
    """The text of a foreign exception may hold anything, a prompt included: it belongs in our log, not in an answer."""
    return exc.for_client() if isinstance(exc, HeadraceError) else _INTERNAL


def status_of(exc: BaseException) -> int:
    """The HTTP status, where there is still room for one."""
    match exc:
        case InvalidRequest():
            return _STATUS_OF_INVALID.get(exc.code, 400)
        case Rejected():
            return _STATUS_OF_REJECTED.get(exc.code, 503)
        case Expired():
            return 504
        case Interrupted():
            return 502
        case _:
            return 500


def _type(exc: BaseException) -> str:
    match exc:
        case InvalidRequest():
            return _TYPE_OF_INVALID.get(exc.code, "invalid_request_error")
        case Rejected():
            return "rate_limit_error" if status_of(exc) == 429 else "server_overloaded"
        case Expired():
            return "timeout_error"
        case _:
            return "server_error"


def _body(exc: BaseException) -> ErrorBody:
    return ErrorBody(
        ErrorDetail(
            message=message_of(exc),
            type=_type(exc),
            param=exc.param if isinstance(exc, InvalidRequest) else None,
            code=code_of(exc),
        )
    )
