import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.frames import FinishReason, Format, Parsing, Sampling, Usage
from workers.answer.dialects import dialect
from workers.answer.dialects.base import Ending, FinishedChoice
from workers.answer.dialects.names import call_id
from workers.answer.parts import CallArguments, CallStart, Content, Reasoning, merged

USAGE = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=4)


def written_by(kind, **changes):
    layout = Format(kind, "id-1", "m", 7, **changes)
    return dialect(layout, Sampling(max_tokens=9), None, prompt=np.arange(5, dtype=np.uint32))


def chat(**changes):
    return written_by("chat", **changes)


def event(written):
    return json.loads(written.decode().removeprefix("data: "))["choices"][0]


def test_a_call_is_told_as_openai_streams_it():
    writer = chat(is_streaming=True)
    started = event(writer.part(0, CallStart(0, "weather")))["delta"]["tool_calls"]
    assert started == [
        {"index": 0, "id": call_id("id-1", 0, 0), "type": "function", "function": {"name": "weather", "arguments": ""}}
    ]
    more = event(writer.part(0, CallArguments(0, '{"a"')))["delta"]["tool_calls"]
    assert more == [{"index": 0, "function": {"arguments": '{"a"'}}]
    assert event(writer.closing(0, Ending(FinishReason.STOP, has_calls=True)))["finish_reason"] == "tool_calls"
    assert event(writer.closing(0, Ending(FinishReason.LENGTH, has_calls=True)))["finish_reason"] == "length"


def test_thoughts_have_both_names():
    assert event(chat(is_streaming=True).part(0, Reasoning("hm")))["delta"] == {
        "reasoning_content": "hm",
        "reasoning": "hm",
    }


def test_a_whole_answer_has_the_calls_and_the_ids_of_a_streamed_one():
    parts = [Reasoning("hm"), CallStart(0, "a"), CallArguments(0, "{}"), CallStart(1, "b"), CallArguments(1, '{"x":1}')]
    choice = FinishedChoice(0, parts, None, Ending(FinishReason.STOP, has_calls=True))
    written = json.loads(chat().body([choice], USAGE))["choices"][0]
    assert written["finish_reason"] == "tool_calls"
    assert written["message"]["content"] is None
    assert written["message"]["reasoning_content"] == "hm"
    assert [(call["id"], call["function"]) for call in written["message"]["tool_calls"]] == [
        (call_id("id-1", 0, 0), {"name": "a", "arguments": "{}"}),
        (call_id("id-1", 0, 1), {"name": "b", "arguments": '{"x":1}'}),
    ]


CUSTOM = Parsing(custom=["shell"])
INPUT = ['{"in', 'put": "ls', " -l\\n", '"}']


def test_a_custom_tool_gets_its_input_as_text_in_a_stream():
    writer = chat(is_streaming=True, parsing=CUSTOM)
    started = event(writer.part(0, CallStart(0, "shell")))["delta"]["tool_calls"]
    assert started == [
        {"index": 0, "id": call_id("id-1", 0, 0), "type": "custom", "custom": {"name": "shell", "input": ""}}
    ]
    deltas = [event(written) for text in INPUT if (written := writer.part(0, CallArguments(0, text)))]
    assert [delta["delta"]["tool_calls"] for delta in deltas] == [
        [{"index": 0, "custom": {"input": "ls"}}],
        [{"index": 0, "custom": {"input": " -l\n"}}],
    ]


def test_a_custom_tool_gets_its_input_as_text_in_a_whole_answer():
    parts = [CallStart(0, "shell"), CallArguments(0, "".join(INPUT)), CallStart(1, "f"), CallArguments(1, "{}")]
    choice = FinishedChoice(0, parts, None, Ending(FinishReason.STOP, has_calls=True))
    custom, function = json.loads(chat(parsing=CUSTOM).body([choice], USAGE))["choices"][0]["message"]["tool_calls"]
    assert (custom["type"], custom["custom"]) == ("custom", {"name": "shell", "input": "ls -l\n"})
    assert (function["type"], function["function"]["name"]) == ("function", "f")


def test_what_a_custom_tool_is_given_in_another_shape_is_not_lost():
    writer = chat(is_streaming=True, parsing=CUSTOM)
    writer.part(0, CallStart(0, "shell"))
    assert writer.part(0, CallArguments(0, '{"in')) == b""
    left, _ = writer.closing(0, Ending(FinishReason.LENGTH, has_calls=True)).decode().removesuffix("\n\n").split("\n\n")
    assert event(left.encode())["delta"]["tool_calls"] == [{"index": 0, "custom": {"input": '{"in'}}]


def test_ids_differ_between_answers_choices_and_calls():
    assert len({call_id(*key) for key in [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0)]}) == 4


@pytest.mark.parametrize("part", [CallStart(0, "a"), CallArguments(0, "{}"), Reasoning("hm")])
def test_a_completion_knows_text_alone(part):
    assert written_by("completion").part(0, part) == b""


PARTS = st.one_of(
    st.builds(Content, st.text(max_size=3)),
    st.builds(Reasoning, st.text(max_size=3)),
    st.builds(CallStart, st.integers(0, 2), st.just("f")),
    st.builds(CallArguments, st.integers(0, 2), st.text(max_size=3)),
)


@given(st.lists(PARTS, max_size=20))
def test_merging_keeps_every_word_in_its_place(parts):
    def spelled(some):
        kinds = [(type(part), getattr(part, "index", None), getattr(part, "text", part)) for part in some]
        return [(kind, index, char) for kind, index, text in kinds for char in (text if isinstance(text, str) else [0])]

    whole = merged(parts)
    assert spelled(whole) == spelled(parts)
    kinds = [(type(part), getattr(part, "index", None)) for part in whole]
    assert all(a != b or a[0] is CallStart for a, b in itertools.pairwise(kinds))
