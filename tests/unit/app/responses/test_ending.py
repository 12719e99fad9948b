import json

import pytest

from app.responses.ending import failed_event, next_number, taken_apart, with_status
from app.serving.errors import GatewayStopping
from planes.wire.errors import InvalidRequest
from planes.wire.frames import Format
from planes.wire.response_object import event, response_event, response_object
from router.errors import QueueFull
from tests.openai_types import checked_event, checked_response, sse

LAYOUT = Format(
    "response",
    "resp_0",
    "m",
    7,
    repeated=b'{"instructions":"\\n\\nevent: x","parallel_tool_calls":true,"tool_choice":"auto","tools":[]}',
)


def test_the_end_of_a_stream_is_taken_apart_whatever_the_response_says():
    body = response_object(LAYOUT, "completed")
    before = event("response.output_text.done", 4, b'"text":"\\",\\"response\\":"')
    last = response_event("response.completed", 5, body)
    for payload in (before + last, last):
        found = taken_apart(payload)
        assert (found.before, found.last, found.body) == (payload.removesuffix(last), last, body)
        assert next_number(payload) == 6
    assert next_number(b"") == 0


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (InvalidRequest("no"), "invalid_prompt"),
        (QueueFull(3, 2, retry_after_s=1.0), "rate_limit_exceeded"),
        (GatewayStopping(), "server_error"),
        (ValueError("secret"), "server_error"),
    ],
)
def test_what_failed_is_told_in_openais_types(exc, code):
    (told,) = sse(failed_event(LAYOUT, exc, 3))
    checked_event(told)
    assert (told["sequence_number"], told["response"]["status"]) == (3, "failed")
    assert told["response"]["error"]["code"] == code
    assert "secret" not in told["response"]["error"]["message"]


def test_another_state_changes_nothing_else():
    body = response_object(LAYOUT, "in_progress")
    changed = json.loads(with_status(body, "failed", {"code": "server_error", "message": "m"}))
    checked_response(changed)
    assert changed == json.loads(body) | {"status": "failed", "error": {"code": "server_error", "message": "m"}}
