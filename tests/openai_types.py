"""Whether JSON is what the `openai` package says it is: every field of every object, none missing and none beside."""

import json
from typing import Any

import pydantic
from openai.types.responses import Response, ResponseStreamEvent

_EVENT: Any = pydantic.TypeAdapter(ResponseStreamEvent)
_RESPONSE_EXTRA = {"store"}
"""OpenAI's own answers have it, and the package's type does not."""


def checked_response(value: dict[str, Any]) -> Response:
    """Raises:  AssertionError, pydantic.ValidationError."""
    known = {key: each for key, each in value.items() if key not in _RESPONSE_EXTRA}
    checked = pydantic.TypeAdapter(Response).validate_python(known, strict=True)
    assert_nothing_beside(checked)
    return checked


def checked_event(value: dict[str, Any]) -> Any:
    """Raises:  AssertionError, pydantic.ValidationError."""
    known = dict(value)
    if "response" in known:
        known["response"] = {key: each for key, each in value["response"].items() if key not in _RESPONSE_EXTRA}
    checked = _EVENT.validate_python(known, strict=True)
    assert checked.type == value["type"]
    assert_nothing_beside(checked)
    return checked


def checked(kind: Any, value: Any) -> Any:
    """The value as this type.  Raises:  AssertionError, pydantic.ValidationError."""
    found = pydantic.TypeAdapter(kind).validate_python(value, strict=True)
    assert_nothing_beside(found)
    return found


def assert_nothing_beside(value: Any) -> None:
    """No model in it has a field that its type does not know: the package would keep it, and nobody reads it."""
    if isinstance(value, pydantic.BaseModel):
        assert not value.__pydantic_extra__, f"{type(value).__name__} has {value.__pydantic_extra__}"
        for name in type(value).model_fields:
            assert_nothing_beside(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            assert_nothing_beside(each)


def sse(written: bytes) -> list[dict[str, Any]]:
    """The events of a stream of responses; each names its type twice."""
    chunks = written.decode().split("\n\n")
    assert chunks.pop() == ""
    events = []
    for chunk in chunks:
        name, data = chunk.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
