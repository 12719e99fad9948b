"""What the demo model is shown, rendered as gateways render it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.prompt.template import ChatTemplate
from workers.demo_model.convert import CHAT_TEMPLATE
from workers.parsers import ParserNames, parser_names

CHECKPOINTS = ChatTemplate(
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OURS = ChatTemplate(CHAT_TEMPLATE.read_text())
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tells <b>time</b>"}}
TOLD = (
    "\n\nYou can call functions. Their signatures, one JSON object a line:\n<tools>\n"
    f"{json.dumps(WEATHER)}\n{json.dumps(CLOCK)}\n"
    "</tools>\nTo call a function, write its name and its arguments as JSON between these tags:\n"
    '<tool_call>\n{"name": "the function", "arguments": {"an argument": "its value"}}\n</tool_call><|im_end|>\n'
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"at": "sea"}}\n</tool_call>'


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def rendered(template, messages, kwargs=None, **more):
    return "".join(segment.text for segment in template.render(messages, kwargs, **more))


turns = st.builds(turn, st.sampled_from(["system", "user", "assistant"]), st.text() | st.just(" x\n\n"))


@given(st.lists(turns, min_size=1, max_size=5), st.booleans())
def test_without_tools_a_prompt_is_the_checkpoint_s_own_to_the_byte(messages, is_reply):
    assert rendered(OURS, messages, is_reply=is_reply) == rendered(CHECKPOINTS, messages, is_reply=is_reply)


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_are_no_tools(tools):
    messages = [turn("user", "Hi")]
    assert rendered(OURS, messages, {"tools": tools}) == rendered(CHECKPOINTS, messages)


def test_content_in_parts_is_their_text():
    parts = [{"type": "text", "text": "Is it "}, "warm", {"type": "text", "text": "?\n"}]
    assert rendered(OURS, [turn("user", parts)]) == rendered(CHECKPOINTS, [turn("user", "Is it warm?\n")])


@pytest.mark.parametrize(
    ("messages", "system"),
    [
        ([turn("user", "Hi")], "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ([turn("system", "Be brief."), turn("user", "Hi")], "Be brief."),
    ],
)
def test_tools_are_told_in_the_system_prompt_one_a_line(messages, system):
    expected = f"<|im_start|>system\n{system}{TOLD}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(OURS, messages, {"tools": [WEATHER, CLOCK]}) == expected


@pytest.mark.parametrize("arguments", [{"at": "sea"}, '{"at": "sea"}'])
@pytest.mark.parametrize(
    ("content", "said"), [("", ""), (None, ""), ("Well.", "Well.\n"), ([{"text": "Well."}], "Well.\n")]
)
def test_calls_and_their_results_are_put_between_tags(arguments, content, said):
    messages = [
        turn("user", "Warm?"),
        turn("assistant", content, tool_calls=[call(arguments), call(arguments)]),
        turn("tool", "20", tool_call_id="1"),
        turn("tool", "21", tool_call_id="2"),
        turn("assistant", "Yes."),
        turn("tool", "22"),
    ]
    text = rendered(OURS, messages, is_reply=False)
    assert text.partition("<|im_start|>user\n")[2] == (
        f"Warm?<|im_end|>\n<|im_start|>assistant\n{said}{CALL}\n{CALL}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n20\n</tool_response>\n<tool_response>\n21\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n22\n</tool_response><|im_end|>\n"
    )


def test_a_call_without_arguments_has_none():
    text = rendered(OURS, [turn("assistant", "", tool_calls=[call({})])])
    assert '{"name": "weather", "arguments": {}}' in text


def test_its_calls_are_read_by_our_own_parser():
    assert parser_names("auto", "auto", CHAT_TEMPLATE.read_text()) == ParserNames("tags", "")
