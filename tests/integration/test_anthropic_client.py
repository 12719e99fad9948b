"""Anthropic's own Python client, unchanged, against the gateway."""

from typing import Any

import anthropic
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

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
