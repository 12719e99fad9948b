"""What a request tells about itself: to its client in headers, to the metrics, to the log. Folds over its exchange."""

from typing import Any

from app.metrics import RequestSummary
from app.openai.request_headers import IGNORED, ROUTE, ignored_header, overhead_header, route_header
from app.serving.attempt import Attempt
from app.serving.effects import Headers
from app.serving.request import GatewayRequest


def headers(request: GatewayRequest, attempt: Attempt | None, fallback: str, *, overhead_s: float) -> Headers:
    """What the answer's head says.

    fallback: why it was not served as it should have been; empty: it was.  overhead_s: see `Exchange`.
    """
    told = [("x-request-id", str(request.request)), overhead_header(overhead_s)]
    if attempt is not None:
        told += [
            ("x-headrace-prefill", attempt.prefill_worker),
            ("x-headrace-decode", attempt.route.decode),
            ("x-headrace-policy", attempt.route.policy),
        ]
        if request.options.is_explained:
            told.append((ROUTE, route_header(attempt.route)))
    if request.ignored:
        told.append((IGNORED, ignored_header(request.ignored)))
    if fallback:
        told.append(("x-headrace-fallback", fallback))
    if request.meter is not None:
        told += request.meter.headers()
    if _is_printable("".join([value for _, value in told])):
        return told
    return [(name, _printable(value)) for name, value in told]


def summary(
    request: GatewayRequest,
    attempt: Attempt | None,
    *,
    code: str,
    num_tokens: int,
    first_at: float | None,
    ended_at: float,
    overhead_s: float,
) -> RequestSummary:
    """For the metrics. attempt: the last one.  first_at: instant of the client's first token."""
    computed = attempt.computed if attempt else None
    moved = attempt.moved if attempt else None
    itl_s = None
    if first_at is not None and num_tokens > 1 and request.sampling.n == 1:
        itl_s = (ended_at - first_at) / (num_tokens - 1)
    return RequestSummary(
        model=request.model,
        code=code,
        prompt_tokens=len(request.prompt),
        completion_tokens=num_tokens,
        cached_tokens=computed.cached_tokens if computed else 0,
        ttft_s=None if first_at is None else first_at - request.arrived_at,
        itl_s=itl_s,
        prefill_s=computed.prefill_s if computed else None,
        handover_s=moved.handover_s if moved else None,
        handover_bytes=moved.handover_bytes if moved else 0,
        overhead_s=overhead_s,
    )


def log_ids(request: GatewayRequest) -> dict[str, str]:
    """By what a line of the log is found."""
    ids: dict[str, str] = {"request_id": request.request}
    if request.trace is not None:
        ids["trace_id"] = request.trace.trace_id
    return ids


def log_record(
    request: GatewayRequest, attempt: Attempt | None, told: RequestSummary, *, num_attempts: int, ended_at: float
) -> dict[str, Any]:
    """The one line at the end of a request."""
    return {
        **log_ids(request),
        "model": request.model,
        "outcome": told.code,
        "prefill": attempt and attempt.prefill_worker,
        "decode": attempt and attempt.route.decode,
        "attempts": num_attempts,
        "held_s": attempt and round(attempt.route.held_s, 4),
        "duration_s": round(ended_at - request.arrived_at, 4),
        "ttft_s": _rounded(told.ttft_s),
        "itl_s": _rounded(told.itl_s),
        "prompt_tokens": told.prompt_tokens,
        "completion_tokens": told.completion_tokens,
        "cached_tokens": told.cached_tokens,
        "handover_bytes": told.handover_bytes,
        "handover_s": _rounded(told.handover_s),
    }


def _is_printable(value: str) -> bool:
    """As a header's value must be: a name from outside may hold anything, line breaks included."""
    return value.isascii() and value.isprintable()


def _printable(value: str) -> str:
    return value if _is_printable(value) else value.encode("unicode_escape").decode("ascii")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
