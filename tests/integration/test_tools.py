"""Tool calls and thoughts through the whole fleet: the simulated engine says what it is told."""

import json
from typing import Any

import anthropic
import openai
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

CALL = '<tool_call>{"name": "weather", "arguments": {"at": "sea"}}</tool_call>'
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
FUNCTION: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TOOL: Any = {"name": "weather", "input_schema": PARAMETERS}


def script(*answers):
    return {"x-headrace-script": json.dumps(answers)}


@pytest.fixture
async def client(stack):
    async with openai.AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_a_chat_calls_a_tool_and_goes_on_with_what_it_said(client, unique):
    headers = script(f"I look.\n{CALL}", "It is warm.")
    messages: list[Any] = [{"role": "user", "content": unique}]
    asked: dict[str, Any] = {"model": "sim", "tools": [FUNCTION], "extra_headers": headers}
    first = (await client.chat.completions.create(messages=messages, **asked)).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", "I look.")
    (call,) = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"at": "sea"})
    async with client.chat.completions.stream(messages=messages, **asked) as stream:
        streamed = (await stream.get_final_completion()).choices[0]
    assert streamed.message.content == "I look."
    assert [call.function.arguments for call in streamed.message.tool_calls] == [call.function.arguments]
    messages += [first.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "20 °C"}]
    second = (await client.chat.completions.create(messages=messages, **asked)).choices[0]
    assert (second.finish_reason, second.message.content) == ("stop", "It is warm.")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_can_be_forced(client, unique, choice):
    answer = await client.chat.completions.create(
        model="sim", messages=[{"role": "user", "content": unique}], tools=[FUNCTION], tool_choice=choice
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert isinstance(json.loads(call.function.arguments)["at"], str)


async def test_a_message_calls_a_tool_and_goes_on_with_what_it_said(stack, unique):
    asked: dict[str, Any] = {
        "model": "sim",
        "max_tokens": 200,
        "tools": [TOOL],
        "extra_headers": script(f"I look.\n{CALL}", "It is warm."),
    }
    messages: list[Any] = [{"role": "user", "content": unique}]
    async with anthropic.AsyncAnthropic(base_url=stack.gateway.url, api_key="any", max_retries=0) as client:
        first = await client.messages.create(messages=messages, **asked)
        assert first.stop_reason == "tool_use"
        text, call = first.content
        assert (text.text, call.name, call.input) == ("I look.", "weather", {"at": "sea"})
        async with client.messages.stream(messages=messages, **asked) as stream:
            streamed = await stream.get_final_message()
        assert [block.type for block in streamed.content] == ["text", "tool_use"]
        assert streamed.content[1].input == call.input
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "20 °C"}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = await client.messages.create(messages=messages, **asked)
        assert (second.stop_reason, second.content[0].text) == ("end_turn", "It is warm.")


async def test_thoughts_are_told_apart_where_a_worker_can(site, unique):
    await site.worker("both-1", "--reasoning-parser", "think")
    gateway = await site.gateway(num_workers=1)
    headers = script("<think>\nhm\n</think>\n\nYes.")
    asked: dict[str, Any] = {
        "model": "sim",
        "messages": [{"role": "user", "content": unique}],
        "extra_headers": headers,
    }
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        answer = await client.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("Yes.", "hm")
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="any", max_retries=0) as other:
        told = await other.messages.create(**asked, max_tokens=200, thinking=thinking)
    assert [block.type for block in told.content] == ["thinking", "text"]
    assert (told.content[0].thinking, told.content[1].text) == ("hm", "Yes.")


async def test_tools_are_refused_where_nobody_finds_calls(site, unique):
    await site.worker("both-1", "--tool-parser", "none")
    gateway = await site.gateway(num_workers=1)
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="--tool-parser"):
            await client.chat.completions.create(
                model="sim", messages=[{"role": "user", "content": unique}], tools=[FUNCTION]
            )
