"""Anthropic's own Python client, unchanged, against the gateway."""

import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent

from tests.openai_types import checked, sse

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RECORDED = Path(__file__).parent / "recorded" / "coding_agent_messages.json"
CALL = '<tool_call>{"name": "Read", "arguments": {"file_path": "README.md"}}</tool_call>'
MESSAGES = [{"role": "user", "content": "What drives a mill?"}]
MESSAGE: dict[str, Any] = {
    "model": "sim",
    "system": "Be brief.",
    "messages": MESSAGES,
    "max_tokens": 24,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
async def client(stack):
    async with anthropic.AsyncAnthropic(base_url=stack.gateway.url, api_key="any", max_retries=0) as client:
        yield client


async def test_a_streamed_message_says_what_a_whole_one_says(client):
    whole = await client.messages.create(**MESSAGE)
    assert (whole.type, whole.role, whole.model, whole.stop_reason) == ("message", "assistant", "sim", "max_tokens")
    (block,) = whole.content
    assert len(block.text) == 24
    async with client.messages.stream(**MESSAGE) as stream:
        parts = [text async for text in stream.text_stream]
        streamed = await stream.get_final_message()
    assert "".join(parts) == block.text
    assert len(parts) > 5
    assert [block.text for block in streamed.content] == [block.text]
    assert streamed.usage.output_tokens == whole.usage.output_tokens == 24
    total = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert streamed.usage.input_tokens + streamed.usage.cache_read_input_tokens == total


async def test_a_count_is_what_the_message_then_has(client):
    system, model = "Be brief.", "sim"
    count = await client.messages.count_tokens(model=model, system=system, messages=MESSAGES)
    whole = await client.messages.create(**MESSAGE)
    assert count.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens > 0


async def test_a_prompt_too_long_to_be_served_can_be_counted(client):
    long = [{"role": "user", "content": "mill " * 10_000}]
    assert (await client.messages.count_tokens(model="sim", messages=long)).input_tokens > 40_000
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        await client.messages.create(model="sim", messages=long, max_tokens=1)


async def test_models_have_anthropic_s_shape(client):
    (model,) = (await client.models.list()).data
    assert (model.id, model.display_name, model.type) == ("sim", "sim", "model")
    assert model.created_at.year >= 2024
    assert await client.models.retrieve("sim") == model


async def test_errors_have_anthropic_s_shape(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        await client.messages.create(**MESSAGE | {"model": "mill"})
    assert "not_found_error" in str(caught.value.body)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.role"):
        await client.messages.create(**MESSAGE | {"messages": [{"role": "mill", "content": "x"}]})
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.role"):
        await client.messages.count_tokens(model="sim", messages=[{"role": "mill", "content": "x"}])


async def test_an_answer_that_fills_the_context_says_so(client):
    long = {"messages": [{"role": "user", "content": "x" * 32_600}], "max_tokens": 8_000}
    whole = await client.messages.create(**MESSAGE | long)
    assert whole.stop_reason == "model_context_window_exceeded"
    async with client.messages.stream(**MESSAGE | long) as stream:
        streamed = await stream.get_final_message()
    assert streamed.stop_reason == "model_context_window_exceeded"
    read = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert read + whole.usage.output_tokens == 32_768


async def test_a_stop_sequence_is_named(client):
    whole = (await client.messages.create(**MESSAGE)).content[0].text
    stop = whole[5:8]
    stopped = await client.messages.create(**MESSAGE, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == whole[: whole.index(stop)]


async def test_a_key_may_come_in_anthropic_s_header(site, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\ntenant = "t"\nkey = "sk-right"\n')
    gateway = await site.gateway("--api-keys-file", str(keys))
    for key, error in (("sk-right", anthropic.NotFoundError), ("sk-wrong", anthropic.AuthenticationError)):
        async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0) as client:
            with pytest.raises(error):
                await client.models.retrieve("sim")


async def test_a_line_for_billing_does_not_keep_a_prompt_from_being_cached(site, unique):
    await site.worker("both-1")
    dropping = await site.gateway(num_workers=1)
    keeping = await site.gateway("--keep-prompt-nonces", num_workers=1)
    cached = []
    for gateway in (dropping, keeping):
        async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="any", max_retries=0) as client:
            for nonce in ("a91f", "b770"):
                system = [
                    {"type": "text", "text": f"x-anthropic-billing-header: cch={nonce};"},
                    {"type": "text", "text": unique * 3, "cache_control": {"type": "ephemeral"}},
                ]
                message = await client.messages.create(**MESSAGE | {"system": system})
                cached.append(message.usage.cache_read_input_tokens > len(unique))
    assert cached == [False, True, False, False]


async def test_a_recorded_request_of_a_coding_agent_replays(site, reach):
    await site.worker("both-1", "--reasoning-parser", "think")
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "interleaved-thinking-2025-05-14,context-management-2025-06-27,effort-2025-11-24",
        "anthropic-dangerous-direct-browser-access": "true",
        "x-app": "cli",
        "x-stainless-retry-count": "0",
        "authorization": "Bearer any",
        "x-headrace-script": json.dumps(["", "", f"<think>I know.</think>It has 160.\n{CALL}"]),
    }
    async with reach(await site.gateway(num_workers=1)) as api:
        recorded = json.loads(RECORDED.read_text())
        assert recorded["max_tokens"] == 32_000  # with the prompt more than the context has
        response = await api.post("/v1/messages?beta=true", json=recorded, headers=headers)
        assert response.status_code == 200, response.text
        prompt = {
            name: recorded[name] for name in ("model", "messages", "system", "tools", "thinking", "output_config")
        }
        counted = (await api.post("/v1/messages/count_tokens?beta=true", json=prompt, headers=headers)).json()
    assert response.headers["x-headrace-ignored"] == "fallback_credit_token"
    told_all = sse(response.content)
    assert {"type": "ping"} in told_all  # the package's type has none, though its client expects them
    events = [checked(RawMessageStreamEvent, event) for event in told_all if event["type"] != "ping"]
    start, end = "content_block_start", "content_block_stop"
    assert [event.type for event in events if event.type != "content_block_delta"] == [
        "message_start",
        *(start, end, start, end, start, end),
        "message_delta",
        "message_stop",
    ]
    opened = [event.content_block for event in events if event.type == start]
    assert [block.type for block in opened] == ["thinking", "text", "tool_use"]
    assert opened[2].name == "Read"
    told: dict[str, str] = {}
    for delta in [event.delta for event in events if event.type == "content_block_delta"]:
        for name, text in delta.model_dump(exclude={"type"}).items():
            told[name] = told.get(name, "") + text
    assert told.pop("signature")
    assert json.loads(told.pop("partial_json")) == {"file_path": "README.md"}
    assert told == {"thinking": "I know.", "text": "It has 160."}
    (last,) = (event for event in events if event.type == "message_delta")
    assert last.delta.stop_reason == "tool_use"
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens == counted["input_tokens"]
