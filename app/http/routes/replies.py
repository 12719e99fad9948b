"""Short answers that are neither streamed nor generated."""

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from app.http.response import ErrorDialect
from app.metrics import Metrics
from app.openai import errors as openai_errors
from app.openai.request_headers import IGNORED, ignored_header


def json_reply(value: Any, status: int = 200) -> Response:
    """Anything that msgspec can encode, dataclasses and structs included."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_reply(exc: BaseException, errors: ErrorDialect = openai_errors) -> Response:
    """An error in the shape of an API, OpenAI's by default."""
    refusal = errors.response(exc)
    return Response(refusal.body, refusal.status, headers=refusal.headers)


def with_ignored(reply: Response, names: Sequence[str], metrics: Metrics) -> Response:
    """The same reply, naming the fields of the request that nobody knows, which are counted."""
    if names:
        metrics.fields_ignored(len(names))
        reply.headers[IGNORED] = ignored_header(names)
    return reply
