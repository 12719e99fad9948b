import json

import pytest

from app.anthropic import errors
from app.openai.errors import BodyTooLarge, ModelNotFound
from app.prompt.prepare import PreparationTimeout
from planes.wire.errors import Interrupted, InvalidRequest, Rejected
from router.errors import QueueFull


@pytest.mark.parametrize(
    ("exc", "status", "kind"),
    [
        (InvalidRequest("no", param="x"), 400, "invalid_request_error"),
        (InvalidRequest("who?", code="invalid_api_key"), 401, "authentication_error"),
        (ModelNotFound("m"), 404, "not_found_error"),
        (BodyTooLarge(2, 1), 413, "request_too_large"),
        (QueueFull(1, 1, retry_after_s=1.0), 429, "rate_limit_error"),
        (Rejected("nobody is there"), 503, "overloaded_error"),
        (PreparationTimeout(), 504, "timeout_error"),
        (Interrupted("lost"), 502, "api_error"),
        (ValueError("secret"), 500, "api_error"),
    ],
)
def test_an_error_has_anthropic_s_shape(exc, status, kind):
    answer = errors.response(exc)
    body = json.loads(answer.body)
    assert (answer.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert "secret" not in body["error"]["message"]
    assert errors.sse_event(exc) == b"event: error\ndata: " + answer.body + b"\n\n"
