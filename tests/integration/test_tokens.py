"""What stands beside generation: tokens of prompts, and how long a context is."""

import anthropic
import openai
import pytest
from anthropic.types import ModelInfo

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What drives a mill?"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


async def tokenized(api, **fields):
    answer = await api.post("/tokenize", json={"model": "sim", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("more", [{}, {"tools": [TOOL]}, {"add_generation_prompt": False}])
async def test_a_conversation_has_the_tokens_that_its_answer_is_charged_for(api, more):
    told = await tokenized(api, messages=MESSAGES, **more)
    body = {"model": "sim", "messages": MESSAGES, "max_tokens": 1, **more}
    usage = (await api.post("/v1/chat/completions", json=body)).json()["usage"]
    assert told["count"] == len(told["tokens"]) == usage["prompt_tokens"]
    assert (told["max_model_len"], told["token_strs"]) == (32_768, None)


async def test_tokens_are_spelt_as_the_vocabulary_does(api):
    told = await tokenized(api, prompt="Once <|end_of_text|>", return_token_strs=True)
    assert told["token_strs"] == [*"Once\u0120", "<|end_of_text|>"]
    assert told["tokens"][:5] == list(b"Once ")
    assert (await tokenized(api, prompt="Once", add_special_tokens=False))["tokens"] == list(b"Once")


async def test_what_was_tokenized_is_text_again(api):
    text = "Ein Mühlrad 水車 " * 4_000  # long enough for a thread
    tokens = (await tokenized(api, prompt=text, add_special_tokens=False))["tokens"]
    back = await api.post("/detokenize", json={"model": "sim", "tokens": tokens})
    assert (back.status_code, back.json()) == (200, {"prompt": text})
    assert (await api.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_a_model_need_not_be_named_where_there_is_one(api):
    answer = await api.post("/tokenize", json={"prompt": "a", "mill": 1})
    assert (answer.status_code, answer.headers["x-headrace-ignored"]) == (200, "mill")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"model": "sim"}, 400, "prompt"),
        ("/tokenize", {"model": "none", "prompt": "a"}, 404, "model"),
        ("/detokenize", {"model": "sim", "tokens": [1 << 20]}, 400, "tokens"),
        ("/detokenize", {"model": "none", "tokens": []}, 404, "model"),
    ],
)
async def test_a_refusal_names_what_is_wrong(api, path, body, status, param):
    refusal = await api.post(path, json=body)
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (status, param)


async def test_models_tell_how_long_a_context_is(stack):
    url = stack.gateway.url
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        (model,) = (await client.models.list()).data
        assert model.model_extra == {"max_model_len": 32_768}
        assert (await client.models.retrieve("sim")).model_extra == model.model_extra
    async with anthropic.AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as other:
        listed = (await other.models.list()).data[0]
    assert (listed.max_input_tokens, listed.max_tokens) == (32_767, 32_767)
    assert ModelInfo.model_validate(listed.model_dump()) == listed
