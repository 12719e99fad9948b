"""Two models behind one gateway, each with workers of its own: one generates, the other makes vectors."""

import asyncio
import base64

import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from tests.openai_types import checked

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

EMBED = ("--task", "embed", "--served-model-name", "vectors")


@pytest.fixture
async def two_models(site, reach):
    site.start_worker("prefill-1")
    site.start_worker("decode-1")
    site.start_worker("both-1", *EMBED, "--context-length", "512")
    site.start_worker("both-2", *EMBED, "--context-length", "512")
    gateway = await site.gateway(num_workers=4)
    async with reach(gateway) as api:
        yield api


async def test_each_of_two_models_is_served_by_its_own_workers(two_models, unique):
    api = two_models
    models = {model["id"]: model["max_model_len"] for model in (await api.get("/v1/models")).json()["data"]}
    assert models == {"sim": 32_768, "vectors": 512}
    for handover in ("auto", "always"):
        answers = await asyncio.gather(
            *[
                api.post(
                    "/v1/embeddings",
                    json={"model": "vectors", "input": f"{number}{unique}"},
                    headers={"x-headrace-handover": handover},
                )
                for number in range(8)
            ],
            *[api.chat(f"{number}{unique}") for number in range(8)],
        )
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-headrace-decode"] for answer in answers[:8]} <= {"both-1", "both-2"}
        assert {answer.headers["x-headrace-decode"] for answer in answers[8:]} == {"decode-1"}

    wrong = await api.chat(unique, model="vectors")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "wrong_task")
    told = "makes embeddings, which are at /v1/embeddings. Models here that generate: 'sim'."
    assert wrong.json()["error"]["message"].endswith(told)
    wrong = await api.post("/v1/embeddings", json={"model": "sim", "input": "a"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "wrong_task")
    assert wrong.json()["error"]["message"].endswith("Models here that embed: 'vectors'.")
    longest = await api.post("/v1/embeddings", json={"model": "vectors", "input": "x" * 512})
    assert longest.json()["usage"]["prompt_tokens"] == 512
    unnamed = await api.post("/tokenize", json={"prompt": "a"})
    assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")

    texts = [f"text {number}" for number in range(100)]
    body = {"model": "vectors", "input": texts, "mill": 1}
    answer = await api.post("/v1/embeddings", json=body)
    assert answer.headers["x-headrace-ignored"] == "mill"
    told = checked(CreateEmbeddingResponse, answer.json())
    assert [each.index for each in told.data] == [*range(100)]
    assert told.usage.prompt_tokens == told.usage.total_tokens == sum(map(len, texts))
    alone = (await api.post("/v1/embeddings", json={**body, "input": [*b"text 42"]})).json()["data"][0]["embedding"]
    assert told.data[42].embedding == alone
    assert len({str(each.embedding) for each in told.data}) == 100

    client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0)
    decoded = await client.embeddings.create(model="vectors", input="text 42")  # asks for base64
    assert decoded.data[0].embedding == alone
    raw = await client.embeddings.create(model="vectors", input="text 42", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(raw.data[0].embedding), "<f4").tolist() == pytest.approx(alone)
    short = await client.embeddings.create(model="vectors", input="text 42", dimensions=8)
    cut = np.array(alone[:8])
    assert short.data[0].embedding == pytest.approx((cut / np.linalg.norm(cut)).tolist(), abs=1e-6)
    for fields, param in (
        ({"input": "x" * 513}, "input"),
        ({"input": [["x"]]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": ["a", ""]}, "input"),
    ):
        refusal = await api.post("/v1/embeddings", json={"model": "vectors", **fields})
        assert (refusal.status_code, refusal.json()["error"]["param"].split("[")[0]) == (400, param), refusal.text
    await client.close()
