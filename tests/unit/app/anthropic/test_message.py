import json
from pathlib import Path

import pytest

from app.anthropic.message import parse_count, parse_message
from app.openai.schema import Kind, Limits
from planes.wire.errors import InvalidRequest

RECORDED = Path(__file__).parents[3] / "integration" / "recorded" / "coding_agent_messages.json"
LIMITS = Limits()
TOOL = {"name": "weather", "description": "…", "input_schema": {"type": "object", "properties": {"at": {}}}}


def parse(limits=LIMITS, **changes):
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]} | changes
    return parse_message(json.dumps(body).encode(), limits)


def refused(**changes):
    with pytest.raises(InvalidRequest) as caught:
        parse(**changes)
    return caught.value


def test_a_plain_message_is_a_chat():
    parsed = parse(system="Be brief.", temperature=0, stop_sequences=["\n\n"], stream=True, metadata={"user_id": "u"})
    assert parsed.kind is Kind.MESSAGE
    assert parsed.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"})
    assert (parsed.max_tokens, parsed.is_streaming, parsed.user) == (9, True, "u")
    assert (parsed.sampling.temperature, parsed.sampling.stop) == (0, ["\n\n"])


def test_a_turn_with_tools_becomes_the_messages_that_templates_know():
    parsed = parse(
        system=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}],
        messages=[
            {"role": "user", "content": "Is it warm?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "…"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"at": "sea"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "20 °C"}]},
                    {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such place", "is_error": True},
                    {"type": "tool_result", "tool_use_id": "toolu_3"},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
        tools=[TOOL, {"type": "web_search_20260318", "name": "web_search"}],
    )
    assert parsed.messages == (
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "Is it warm?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning": "hm",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": {"at": "sea"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "20 °C"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no such place"},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
        {"role": "user", "content": "So?"},
    )
    assert [tool["function"]["name"] for tool in parsed.tools] == ["weather"]


@pytest.mark.parametrize(
    ("choice", "expected", "is_bound"),
    [
        (None, "auto", False),
        ({"type": "auto"}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "tool", "name": "weather"}, "function:weather", True),
    ],
)
def test_a_choice_of_tools_has_its_word(choice, expected, is_bound):
    parsed = parse(tools=[TOOL], tool_choice=choice)
    assert parsed.parsing.tool_choice == expected
    assert (parsed.sampling.structured is not None) == is_bound


def test_tools_that_must_not_be_called_are_not_looked_for():
    parsed = parse(tools=[TOOL], tool_choice={"type": "none"})
    assert (parsed.tools, parsed.parsing) == ((), None)


def test_one_call_at_a_time_can_be_asked_for():
    parsed = parse(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert not parsed.parsing.is_parallel


def test_thinking_reaches_template_engine_and_parser():
    parsed = parse(thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "high"})
    assert parsed.template_kwargs == {"enable_thinking": True, "reasoning_effort": "high"}
    assert parsed.sampling.thinking_tokens == 1024
    assert parse(thinking={"type": "disabled"}).template_kwargs == {"enable_thinking": False}


def test_a_format_binds_the_answer():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    parsed = parse(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(parsed.sampling.structured.json_schema) == schema


def test_a_format_has_the_limit_of_every_schema():
    config = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    parse(Limits(schema_bytes=18), output_config=config)
    with pytest.raises(InvalidRequest, match="the limit is 17") as caught:
        parse(Limits(schema_bytes=17), output_config=config)
    assert caught.value.param == "output_config.format.schema"


def test_an_answer_that_the_client_has_begun_is_continued():
    parsed = parse(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is ("}])
    assert (parsed.is_continued, parsed.is_reply) == (True, False)
    assert parse().is_reply


def test_a_document_that_brings_its_text_is_text():
    source = {"type": "text", "media_type": "text/plain", "data": "Once"}
    parsed = parse(messages=[{"role": "user", "content": [{"type": "document", "source": source, "title": "Tale"}]}])
    assert parsed.messages[0]["content"] == "Tale\nOnce"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"temperature": 1.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"thinking": {"type": "hard"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice"),
        ({"tool_choice": {"type": "most"}}, "tool_choice.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 1}}}, "output_config.format.schema"),
        ({"model": 7}, "model"),
    ],
)
def test_what_is_wrong_is_named(changes, param):
    assert refused(**changes).param == param


def test_a_count_needs_no_length():
    parsed = parse_count(json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode())
    assert parsed.messages == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    "block",
    [
        b'{"type": "tool_use", "name": "f", "input": {"a": "\xb8"}}',
        b'{"type": "document", "source": {"type": "text", "data": "\xb8"}}',
    ],
    ids=["input", "source"],
)
def test_bytes_that_are_no_text_are_refused_where_a_block_is_read_later(block):
    body = b'{"model": "m", "max_tokens": 1, "messages": [{"role": "assistant", "content": [%b]}]}' % block
    with pytest.raises(InvalidRequest):
        parse_message(body)


def test_fields_that_nobody_knows_are_named_and_left_out():
    thinking = {"type": "enabled", "budget_tokens": 1024, "mood": "calm"}
    parsed = parse(mill=1, thinking=thinking, context_management={"edits": []}, output_config={"pace": 1})
    assert parsed.ignored == ("mill", "thinking.mood", "output_config.pace")
    assert parsed.sampling.thinking_tokens == 1024
    counted = parse_count(
        b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "mill": 1, "speed": "fast"}'
    )
    assert counted.ignored == ("mill",)


@pytest.mark.parametrize(("field", "value"), [("temprature", 1), ("thinking", {"type": "enabled", "mood": 1})])
def test_fields_that_nobody_knows_are_refused_where_fields_are_strict(field, value):
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], field: value}
    with pytest.raises(InvalidRequest, match=r"temperature|thinking\.mood"):
        parse_message(json.dumps(body).encode(), Limits(has_strict_fields=True))


def test_a_recorded_request_of_a_coding_agent_is_read_whole():
    recorded = json.loads(RECORDED.read_text())
    parsed = parse_message(RECORDED.read_bytes())
    assert parsed.ignored == ("fallback_credit_token",)
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "tool", "tool", "user"]
    assert [message["role"] for message in parsed.messages] == roles
    assert parsed.messages[2]["reasoning_content"] == "I count them."
    called = [call["function"]["name"] for call in parsed.messages[4]["tool_calls"]]
    assert called == ["Read", "Grep", "TodoWrite"]
    assert parsed.messages[4]["tool_calls"][1]["function"]["arguments"] == {"pattern": "wheel", "-n": True}
    assert [message["content"] for message in parsed.messages[5:]] == [
        "     1\t# Mill\n     2\tA wheel.\n<system-reminder>\nThe file goes on.\n</system-reminder>",
        "Error: <tool_use_error>Error: ripgrep exited with code 2</tool_use_error>",
        "",
        "[Request interrupted by user]\nHow many lines, in one word?",
    ]
    offered = [tool["name"] for tool in recorded["tools"] if "type" not in tool]
    assert [tool["function"]["name"] for tool in parsed.tools] == offered
    assert parsed.is_streaming
    assert (parsed.user, parsed.template_kwargs["reasoning_effort"]) == (recorded["metadata"]["user_id"], "high")


def test_what_the_answer_shall_keep_arrives_in_seconds():
    parsed = parse(slo_ttft_ms=250, slo_itl_ms=40)
    assert (parsed.slo_ttft_s, parsed.slo_itl_s) == (0.25, 0.04)
    assert refused(slo_itl_ms=0).param == "slo_itl_ms"
