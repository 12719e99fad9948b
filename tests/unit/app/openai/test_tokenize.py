import json

import msgspec
import pytest

from app.openai.schema import Kind, Limits
from app.openai.tokenize import DetokenizeBody, TokenizeBody, parse_detokenize, parse_tokenize
from planes.wire.errors import InvalidRequest

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def body(**fields):
    return json.dumps(fields).encode()


def test_a_prompt_is_taken_with_what_a_model_puts_around_it_unless_that_is_not_wanted():
    asked = parse_tokenize(body(model="m", prompt="", return_token_strs=True))
    assert (asked.parsed.kind, asked.parsed.prompt, asked.parsed.model) == (Kind.COMPLETION, "", "m")
    assert (asked.is_plain, asked.has_strings) == (False, True)
    assert parse_tokenize(body(prompt="a", add_special_tokens=False)).is_plain


def test_a_conversation_is_taken_as_a_chat_would_take_it():
    parsed = parse_tokenize(body(messages=MESSAGES, tools=[TOOL], chat_template_kwargs={"a": 1})).parsed
    assert (parsed.kind, parsed.model, parsed.is_reply, parsed.is_continued) == (Kind.CHAT, "", True, False)
    assert [tool["function"]["name"] for tool in parsed.tools] == ["f"]
    assert parsed.template_kwargs == {"a": 1}
    assert not parse_tokenize(body(messages=MESSAGES, add_generation_prompt=False)).parsed.is_reply
    continued = parse_tokenize(body(messages=MESSAGES, continue_final_message=True)).parsed
    assert (continued.is_reply, continued.is_continued) == (False, True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": 7}, "prompt"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        (
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        parse_tokenize(body(**fields))
    assert refused.value.param == param


def test_tokens_are_ids_and_may_be_none():
    asked = parse_detokenize(body(model="m", tokens=[1, 2**32 - 1]))
    assert (asked.model, asked.tokens.tolist()) == ("m", [1, 2**32 - 1])
    assert parse_detokenize(b'{"tokens": [ ]}').tokens.tolist() == []


@pytest.mark.parametrize(
    ("tokens", "param"),
    [("a", "tokens"), ([1, "a"], "tokens"), ([-1], "tokens"), ([1, 2.5], "tokens[1]"), (None, "tokens")],
)
def test_what_is_no_list_of_ids_is_refused_by_name(tokens, param):
    with pytest.raises(InvalidRequest) as refused:
        parse_detokenize(body(tokens=tokens))
    assert refused.value.param == param


@pytest.mark.parametrize(("parse", "given"), [(parse_tokenize, {"prompt": "a"}), (parse_detokenize, {"tokens": [1]})])
def test_fields_that_nobody_knows_are_left_out_or_refused(parse, given):
    asked = parse(body(**given, mill=1))
    assert getattr(asked, "parsed", asked).ignored == ("mill",)
    with pytest.raises(InvalidRequest, match="mill"):
        parse(body(**given, mill=1), Limits(has_strict_fields=True))


def test_every_field_of_vllm_is_known():
    """Of 0.32; vLLM itself is not installed everywhere."""
    theirs = {
        "model",
        "prompt",
        "messages",
        "add_special_tokens",
        "return_token_strs",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "chat_template_kwargs",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "tools",
    }
    assert theirs <= {field.name for field in msgspec.structs.fields(TokenizeBody)}
    assert {field.name for field in msgspec.structs.fields(DetokenizeBody)} == {"model", "tokens"}
