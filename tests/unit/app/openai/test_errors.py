import json

import pytest

from app.auth import TooManyConcurrent, Unauthenticated
from app.openai.errors import BodyTooLarge, ModelNotFound, code_of, response, sse_event
from app.serving.errors import NotResumable, TicketExpired, WorkerBusy, WorkerDisagrees, WorkerFailed, WorkerRefused
from planes.wire.errors import HeadraceError, Interrupted, InvalidRequest, Rejected
from planes.wire.messages import WorkerId
from router.errors import (
    ContextTooLong,
    DeadlineExceeded,
    DuplicateRequest,
    NoPair,
    NoWorker,
    PolicyFailed,
    QueueFull,
    SloMissed,
)


@pytest.mark.parametrize(
    ("exc", "status", "kind", "code"),
    [
        (InvalidRequest("x", param="n"), 400, "invalid_request_error", "invalid_request"),
        (InvalidRequest("x", code="context_length_exceeded"), 400, "invalid_request_error", "context_length_exceeded"),
        (Unauthenticated("x"), 401, "authentication_error", "invalid_api_key"),
        (ModelNotFound("gpt"), 404, "invalid_request_error", "model_not_found"),
        (BodyTooLarge(5, 4), 413, "invalid_request_error", "body_too_large"),
        (QueueFull(9, 9, retry_after_s=1.0), 429, "rate_limit_error", "queue_full"),
        (SloMissed(2.0, 1.0, retry_after_s=1.0), 429, "rate_limit_error", "slo_missed"),
        (WorkerBusy(WorkerId("w"), "full"), 429, "rate_limit_error", "worker_busy"),
        (NoWorker("m", num_workers=0), 503, "server_overloaded", "no_worker"),
        (NoPair("m", num_workers=1), 503, "server_overloaded", "no_pair"),
        (ContextTooLong("m", 9, longest=8, num_workers=1), 503, "server_overloaded", "context_too_long"),
        (DeadlineExceeded(1.0), 504, "timeout_error", "deadline"),
        (DuplicateRequest("r"), 409, "server_overloaded", "duplicate_request"),
        (PolicyFailed("mine", KeyError("x")), 500, "server_overloaded", "policy_failed"),
        (TooManyConcurrent("t", 3, 1, 3), 429, "rate_limit_error", "concurrency_limit"),
        (Rejected("x"), 503, "server_overloaded", "rejected"),
        (Interrupted("x"), 502, "server_error", "interrupted"),
        (HeadraceError("x"), 500, "server_error", "internal_error"),
        (RuntimeError("secret prompt"), 500, "server_error", "internal_error"),
    ],
)
def test_each_branch_has_its_status_type_and_code(exc, status, kind, code):
    answer = response(exc)
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["type"], error["code"]) == (status, kind, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert code_of(exc) == code


def test_the_field_is_named():
    assert json.loads(response(InvalidRequest("x", param="n")).body)["error"]["param"] == "n"


def test_the_text_of_a_foreign_exception_stays_inside():
    assert b"secret" not in response(RuntimeError("secret")).body
    assert b"secret" not in sse_event(RuntimeError("secret"))


@pytest.mark.parametrize(
    ("retry_after_s", "seconds", "milliseconds"), [(0.2, "1", "200"), (2.5, "3", "2500"), (0, "1", "1")]
)
def test_retry_after_is_rounded_up_and_never_zero(retry_after_s, seconds, milliseconds):
    headers = response(Rejected("x", retry_after_s=retry_after_s)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == (seconds, milliseconds)


def test_without_a_guess_there_is_no_retry_after():
    assert "retry-after" not in response(Rejected("x")).headers


def test_a_stream_ends_with_one_event_that_holds_the_error():
    event = sse_event(Interrupted("line\nbreak"))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:])["error"]["message"] == "line\nbreak"


@pytest.mark.parametrize(
    "exc",
    [
        PolicyFailed("mine", KeyError("secret")),
        WorkerRefused("d0", "unknown_model", "secret"),
        WorkerBusy("d0", "secret"),
        WorkerFailed("d0", "engine_died", "ValueError: secret"),
        WorkerDisagrees("d0", "invalid_request", "secret"),
        TicketExpired("d0", "secret"),
        NotResumable(2, "secret"),
    ],
)
def test_words_of_workers_and_policies_stay_inside(exc):
    assert b"secret" not in response(exc).body + sse_event(exc)
    assert exc.code in json.loads(response(exc).body)["error"]["code"]


def test_a_single_choice_that_cannot_be_continued_is_not_said_to_be_one_of_several():
    told = json.loads(response(NotResumable(1, "lost")).body)["error"]["message"]
    assert told == "an answer with these parameters cannot be continued on another worker"
    assert "an answer of n = 2 choices" in json.loads(response(NotResumable(2, "lost")).body)["error"]["message"]
