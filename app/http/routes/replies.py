"""Short answers that are neither streamed nor generated."""

from typing import Any

import msgspec
from fastapi import Response

from app.openai import errors


def json_reply(value: Any, status: int = 200) -> Response:
    """Anything that msgspec can encode, dataclasses and structs included."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_reply(exc: BaseException) -> Response:
    """An error in OpenAI's shape."""
    refusal = errors.response(exc)
    return Response(refusal.body, refusal.status, headers=refusal.headers)
