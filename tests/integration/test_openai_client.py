"""OpenAI's own Python client, unchanged, against the gateway."""

import hashlib
import json
from typing import Any

import openai
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What drives a mill?"}]
CHAT: dict[str, Any] = {"model": "sim", "messages": MESSAGES, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
COMPLETION = {"model": "sim", "prompt": "Once upon a time", "max_tokens": 24, "extra_body": {"ignore_eos": True}}


@pytest.fixture
async def client(stack):
    async with openai.AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_models_are_listed(client):
    models = (await client.models.list()).data
    assert [model.id for model in models] == ["sim"]
    assert models[0].object == "model"
    assert models[0].created > 1_700_000_000
    assert await client.models.retrieve("sim") == models[0]


async def test_a_model_that_nobody_serves_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="'mil/l' does not exist"):
        await client.models.retrieve("mil/l")


async def test_the_synchronous_client_works_too(stack):
    with openai.OpenAI(base_url=f"{stack.gateway.url}/v1", api_key="any", max_retries=0) as client:
        whole = client.chat.completions.create(**CHAT).choices[0].message.content
        with client.chat.completions.create(**CHAT, stream=True) as stream:
            parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == whole
    assert len(parts) > 5


async def test_a_streamed_chat_says_what_a_whole_one_says(client):
    whole = await client.chat.completions.create(**CHAT)
    assert (whole.object, whole.model) == ("chat.completion", "sim")
    (choice,) = whole.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert len(choice.message.content) == 24
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (24, whole.usage.prompt_tokens + 24)

    chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_streamed_completion_says_what_a_whole_one_says(client):
    whole = await client.completions.create(**COMPLETION)
    assert (whole.object, whole.choices[0].finish_reason, len(whole.choices[0].text)) == (
        "text_completion",
        "length",
        24,
    )
    chunks = [chunk async for chunk in await client.completions.create(**COMPLETION, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    tokens = await client.completions.create(**{**COMPLETION, "prompt": [257, *b"Once upon a time"]})
    assert tokens.usage.prompt_tokens == 17
    echoed = await client.completions.create(**COMPLETION, echo=True)
    assert echoed.choices[0].text.startswith("Once upon a time")


async def test_usage_comes_at_the_end_of_a_stream_that_asks_for_it(client):
    stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_several_choices_are_several_answers(client):
    whole = await client.chat.completions.create(**CHAT, n=3, temperature=1.0)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 72
    streamed = ["", "", ""]
    async for chunk in await client.chat.completions.create(**CHAT, n=3, temperature=1.0, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_stop_string_ends_the_answer_before_it(client, is_streaming):
    whole = (await client.chat.completions.create(**CHAT)).choices[0].message.content
    stop = whole[9:12]
    answer = await client.chat.completions.create(**CHAT, stop=[stop, "never"], stream=is_streaming)
    if is_streaming:
        choices = [chunk.choices[0] async for chunk in answer]
        text, finish = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert finish == "stop"


async def test_a_seed_decides_the_answer(client):
    async def answer(seed):
        return (await client.chat.completions.create(**CHAT, seed=seed, temperature=1.0)).choices[0].message.content

    assert await answer(1) == await answer(1)
    assert await answer(1) != await answer(2)


async def test_an_answer_may_end_by_itself(client):
    whole = await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=20000)
    assert whole.choices[0].finish_reason == "stop"


async def test_logprobs_come_with_every_token(client):
    whole = await client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    content = whole.choices[0].logprobs.content
    assert "".join(token.token for token in content) == whole.choices[0].message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in content)
    assert all(token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in content)
    completion = await client.completions.create(**COMPLETION, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 24
    stream = await client.chat.completions.create(**CHAT, logprobs=True, stream=True)
    streamed = [token async for chunk in stream for token in (chunk.choices[0].logprobs or _NONE).content]
    assert [token.token for token in streamed] == [token.token for token in content]


class _NONE:
    content = ()


async def test_a_bad_value_is_a_bad_request_that_names_it(client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**CHAT, temperature=5)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    assert "5" in caught.value.message
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{**CHAT, "max_tokens": 10**6})
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


async def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(**{**CHAT, "model": "gpt-4o"})
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "gpt-4o" in caught.value.message


async def test_keys_are_checked_where_there_are_some(stack, tmp_path):
    keys = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"sk-other").hexdigest()
    keys.write_text(f'[[keys]]\ntenant = "a"\nkey = "sk-right"\n[[keys]]\ntenant = "b"\nsha256 = "{digest}"\n')
    gateway = await stack.site.gateway("--api-keys-file", str(keys), num_workers=3)
    url = f"{gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="sk-wrong", max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            await wrong.chat.completions.create(**CHAT)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await wrong.models.list()
    for key in ("sk-right", "sk-other"):
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as right:
            assert len((await right.chat.completions.create(**CHAT)).choices[0].message.content) == 24
    gateway.process.kill()


async def test_a_stream_may_be_left_early(client, api, until):
    stream = await client.chat.completions.create(**{**CHAT, "max_tokens": 20000}, stream=True)
    async for _ in stream:
        break
    await stream.close()

    async def is_idle():
        return all(worker["num_streams"] == 0 for worker in (await api.fleet()).values())

    await until(is_idle)


async def test_several_prompts_are_answered_in_one_answer(client):
    asked = {"model": "sim", "max_tokens": 8, "seed": 3, "n": 2, "extra_body": {"ignore_eos": True}}
    prompts = ["Once upon a time", "In the beginning", [70, 71, 72]]
    alone = [await client.completions.create(prompt=prompt, **asked) for prompt in prompts]
    together = await client.completions.create(prompt=prompts, **asked)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [choice.text for each in alone for choice in each.choices]
    assert together.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)
    assert together.usage.completion_tokens == 48

    options = {"stream": True, "stream_options": {"include_usage": True}}
    texts = dict.fromkeys(range(6), "")
    chunks = [chunk async for chunk in await client.completions.create(prompt=prompts, **asked, **options)]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in together.choices]
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [48]
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_prompt_that_was_prewarmed_is_cached_and_nothing_was_said(client):
    long = {"role": "user", "content": "prewarm " * 60}
    asked = {"model": "sim", "messages": [long], "extra_body": {"prompt_cache_options": {"prewarm": True}}}
    warmed = await client.chat.completions.create(**asked)
    assert warmed.choices[0].message.content == ""
    assert warmed.usage.completion_tokens == 0
    answer = await client.chat.completions.create(model="sim", messages=[long], max_tokens=3)
    assert answer.usage.prompt_tokens_details.cached_tokens >= warmed.usage.prompt_tokens - 32


async def test_json_that_a_schema_asks_for_validates(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    answer = await client.chat.completions.create(
        **{**CHAT, "max_tokens": 200, "extra_body": {}}, response_format=asked
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["a"], int)
