import json

import msgspec
import pytest

from app.openai.bodies import Message
from app.openai.messages import template_messages
from planes.wire.errors import InvalidRequest

DECODER = msgspec.json.Decoder(list[Message])


def rendered(*messages):
    return template_messages(DECODER.decode(json.dumps(messages)))


def one(**message):
    return rendered(message)[0]


def called(arguments, **function):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments, **function}}
    return one(role="assistant", tool_calls=[call])["tool_calls"][0]["function"]


@pytest.mark.parametrize("part", ["text", "input_text"])
def test_text_parts_are_joined_by_newlines(part):
    assert one(role="user", content=[{"type": part, "text": "a"}, {"type": part, "text": "b"}])["content"] == "a\nb"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "alien", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ],
)
def test_a_message_that_a_user_got_wrong_is_refused_with_its_place(message, param):
    with pytest.raises(InvalidRequest) as caught:
        rendered(message)
    assert caught.value.param == param


def test_an_answer_sent_back_as_history_is_accepted():
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    }
    tool = {"role": "tool", "tool_call_id": "1", "content": "42"}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert rendered(answer, tool) == (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    )


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"content": None},
        {"content": ""},
        {"content": []},
        {"content": None, "tool_calls": []},
        {"content": None, "audio": {"id": "a"}},
        {"content": None, "mood": "good"},
        {"content": [{"type": "image", "source": {}}]},
    ],
)
def test_whatever_a_model_said_or_did_not_say_is_history(said):
    assert one(role="assistant", **said) == {"role": "assistant", "content": ""}


def test_a_refusal_is_content():
    assert one(role="assistant", content=None, refusal="No.")["content"] == "No."
    assert one(role="assistant", content=[{"type": "refusal", "refusal": "No."}])["content"] == "No."


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_reaches_the_template_by_either_name(field):
    message = one(role="assistant", content="x", **{field: "hm"})
    assert (message["reasoning"], message["reasoning_content"]) == ("hm", "hm")


def test_reasoning_in_a_part_of_the_content_is_reasoning():
    message = one(role="assistant", content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}])
    assert (message["reasoning_content"], message["content"]) == ("hm", "x")


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"x": 1}', {"x": 1}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ({"x": 1}, {"x": 1}),
        ('{"x": "cut o', '{"x": "cut o'),
        ("[1]", "[1]"),
        ("7", "7"),
        ("no JSON", "no JSON"),
    ],
)
def test_arguments_are_an_object_or_the_text_that_the_model_wrote(arguments, given):
    assert called(arguments)["arguments"] == given


def test_a_call_of_a_custom_tool_is_that_of_a_function():
    call = {"id": "1", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    assert one(role="assistant", tool_calls=[call])["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "patch", "arguments": {"input": "*** Begin"}}}
    ]


def test_calls_of_openais_older_shape_are_history_too():
    assert rendered(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "42"},
    ) == (
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "name": "f", "content": "42"},
    )
