"""Checked with the types of Anthropic's own client, and by what that client makes of the stream."""

import json

import numpy as np
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from planes.wire.frames import FinishReason, Format, Sampling, Usage
from workers.answer.dialects import dialect
from workers.answer.dialects.base import Ending, FinishedChoice
from workers.answer.parts import CallArguments, CallStart, Content, Reasoning, merged

EVENT = TypeAdapter(RawMessageStreamEvent)
USAGE = Usage(prompt_tokens=9, completion_tokens=5, cached_tokens=4, reasoning_tokens=2)
CALL = [CallStart(0, "weather"), CallArguments(0, '{"at":'), CallArguments(0, '"sea"}')]


def writer(**changes):
    layout = Format("message", "msg_1", "m", 7, **changes)
    return dialect(layout, Sampling(max_tokens=9), None, prompt=np.arange(9, dtype=np.uint32))


def streamed(parts, ending):
    message = writer(is_streaming=True)
    pieces = [message.opening(0), *(message.part(0, part) for part in parts), message.closing(0, ending)]
    return b"".join(pieces) + message.last(USAGE)


def events(written):
    for piece in written.decode().split("\n\n")[:-1]:
        name, data = piece.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event, strict=False)
        yield event


def assembled(written):
    """What a client has after the stream."""
    blocks, told = [], {}
    for event in events(written):
        match event["type"]:
            case "message_start":
                told = event["message"]
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(dict(event["content_block"]))
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                ((field, text),) = [(key, value) for key, value in event["delta"].items() if key != "type"]
                blocks[-1][field] = blocks[-1].get(field, "") + text
            case "message_delta":
                told = told | event["delta"] | {"usage": event["usage"]}
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("partial_json", "{}"))
    return told | {"content": blocks}


@pytest.mark.parametrize(
    ("parts", "ending", "reason"),
    [
        ([Content("a"), Content("b")], Ending(FinishReason.STOP), "end_turn"),
        ([Content("a")], Ending(FinishReason.LENGTH), "max_tokens"),
        ([Content("a")], Ending(FinishReason.STOP, stop="###"), "stop_sequence"),
        ([], Ending(FinishReason.STOP), "end_turn"),
        ([Reasoning("h"), Reasoning("m"), Content("a"), *CALL], Ending(FinishReason.STOP, has_calls=True), "tool_use"),
        ([*CALL, CallStart(1, "now")], Ending(FinishReason.STOP, has_calls=True), "tool_use"),
        ([Reasoning("h"), Content("a"), Reasoning("m")], Ending(FinishReason.STOP), "end_turn"),
    ],
)
def test_a_stream_says_what_the_whole_message_says(parts, ending, reason):
    whole = json.loads(writer().body([FinishedChoice(0, merged(parts), None, ending)], USAGE))
    Message.model_validate(whole, strict=True)
    assert assembled(streamed(parts, ending)) == whole
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, ending.stop or None)
    assert whole["usage"] == {
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 2},
    }


@pytest.mark.parametrize(("is_bound", "reason"), [(True, "model_context_window_exceeded"), (False, "max_tokens")])
def test_what_ended_an_answer_that_is_cut_off_is_told_apart(is_bound, reason):
    ending = Ending(FinishReason.LENGTH)
    whole = json.loads(writer(is_context_bound=is_bound).body([FinishedChoice(0, (), None, ending)], USAGE))
    streaming = writer(is_context_bound=is_bound, is_streaming=True)
    told = streaming.opening(0) + streaming.closing(0, ending) + streaming.last(USAGE)
    (last,) = (event for event in events(told) if event["type"] == "message_delta")
    assert whole["stop_reason"] == last["delta"]["stop_reason"] == reason


def test_events_come_in_anthropic_s_order():
    written = streamed([Reasoning("h"), Content("a"), *CALL], Ending(FinishReason.STOP))
    kinds = [event["type"] for event in events(written)]
    block = ["content_block_start", "content_block_delta"]
    assert kinds == [
        "message_start",
        "ping",
        *block,
        "content_block_delta",  # the signature
        "content_block_stop",
        *block,
        "content_block_stop",
        *block,
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    "parts",
    [
        [CallStart(0, "f"), CallStart(1, "g"), CallArguments(0, '{"a":1}'), CallArguments(1, '{"b":2}')],
        [CallStart(0, "f"), CallStart(1, "g"), CallArguments(1, '{"b":2}'), CallArguments(0, '{"a":1}')],
        [
            CallStart(0, "f"),
            CallArguments(0, '{"a"'),
            CallStart(1, "g"),
            CallArguments(1, '{"b"'),
            CallArguments(0, ":1}"),
            CallArguments(1, ":2}"),
        ],
    ],
)
def test_arguments_that_come_amid_others_are_their_own_call_s(parts):
    ending = Ending(FinishReason.STOP, has_calls=True)
    whole = json.loads(writer().body([FinishedChoice(0, merged(parts), None, ending)], USAGE))
    assert [(block["name"], block["input"]) for block in whole["content"]] == [("f", {"a": 1}), ("g", {"b": 2})]
    assert assembled(streamed(parts, ending)) == whole


def test_text_amid_a_call_s_arguments_follows_the_call():
    parts = [CALL[0], Content("so"), Reasoning("hm"), *CALL[1:], Reasoning("m"), Content("on")]
    ending = Ending(FinishReason.STOP, has_calls=True)
    whole = json.loads(writer().body([FinishedChoice(0, merged(parts), None, ending)], USAGE))
    assert [block["type"] for block in whole["content"]] == ["tool_use", "text", "thinking", "text"]
    assert assembled(streamed(parts, ending)) == whole


def test_arguments_that_are_no_object_are_handed_on():
    choice = FinishedChoice(0, [CallStart(0, "f"), CallArguments(0, "{nonsense")], None, Ending(FinishReason.STOP))
    assert json.loads(writer().body([choice], USAGE))["content"][0]["input"] == {"arguments": "{nonsense"}


WORDS = st.text(min_size=1, max_size=3)
PARTS = st.lists(st.one_of(st.builds(Content, WORDS), st.builds(Reasoning, WORDS)), max_size=12)


@given(PARTS)
def test_any_parts_give_valid_events_and_the_same_message(parts):
    ending = Ending(FinishReason.STOP)
    whole = json.loads(writer().body([FinishedChoice(0, merged(parts), None, ending)], USAGE))
    assert assembled(streamed(parts, ending)) == whole
