import json

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from app.http.prewarmed import PrewarmedResponse
from app.serving.request import Prewarm
from planes.wire.frames import Format
from planes.wire.response_object import response_object
from tests.fakes import FakeResponse
from tests.openai_types import checked_event, checked_response, sse

USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 1,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
EMPTY = USAGE | {"completion_tokens": 0, "total_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 0}}
CHAT = {
    "id": "i",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
COMPLETION = CHAT | {
    "object": "text_completion",
    "choices": [{"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}],
}
INPUT_USAGE = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 5}}
RESPONSE = json.loads(
    response_object(
        Format("response", "resp_1", "m", 1, repeated=b'{"parallel_tool_calls":true,"tool_choice":"auto","tools":[]}'),
        "incomplete",
        output=b'[{"id":"msg_1_0","type":"reasoning","summary":[]}]',
        usage=json.dumps(
            {**INPUT_USAGE, "output_tokens": 1, "output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 10}
        ).encode(),
        incomplete_reason="max_output_tokens",
    )
)
EMPTY_RESPONSE = RESPONSE | {
    "status": "completed",
    "incomplete_details": None,
    "output": [],
    "usage": {**INPUT_USAGE, "output_tokens": 0, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 9},
}


def answered(body, **wanted):
    response = FakeResponse()
    wrapped = PrewarmedResponse(
        response, Prewarm(wanted.get("is_streaming", False), wanted.get("include_usage", False))
    )
    wrapped.whole(200, [("content-type", "application/json"), ("x-request-id", "r")], json.dumps(body).encode())
    assert response.is_ended
    assert response.headers["x-request-id"] == "r"
    return response


@pytest.mark.parametrize(("body", "kind"), [(CHAT, ChatCompletion), (COMPLETION, Completion)])
def test_the_answer_has_no_tokens_and_says_what_was_cached(body, kind):
    told = kind.model_validate_json(answered(body).body)
    choice = told.choices[0]
    assert (choice.message.content if kind is ChatCompletion else choice.text) == ""
    assert choice.finish_reason == "length"
    assert told.usage.to_dict() == EMPTY


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_says_the_same(include_usage):
    response = answered(CHAT, is_streaming=True, include_usage=include_usage)
    assert "content-type" not in response.headers  # a stream's own
    *events, done = b"".join(response.payloads).decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    first, *rest = [ChatCompletionChunk.model_validate_json(each.removeprefix("data: ")) for each in events]
    assert (first.choices[0].delta.content, first.choices[0].finish_reason) == ("", "length")
    assert [each.usage.to_dict() for each in rest] == [EMPTY] * include_usage


def test_a_response_has_no_items_and_is_complete():
    told = json.loads(answered(RESPONSE).body)
    checked_response(told)
    assert told == EMPTY_RESPONSE


def test_a_streamed_response_says_the_same():
    response = answered(RESPONSE, is_streaming=True)
    events = sse(b"".join(response.payloads))
    for event in events:
        checked_event(event)
    kinds = ["response.created", "response.in_progress", "response.completed"]
    assert [(event["type"], event["sequence_number"]) for event in events] == list(zip(kinds, range(3), strict=True))
    begun = EMPTY_RESPONSE | {"status": "in_progress", "usage": None}
    assert [event["response"] for event in events] == [begun, begun, EMPTY_RESPONSE]
