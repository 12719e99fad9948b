"""Three models behind one gateway, on real vLLM, each with a worker of its own: two chat, one makes vectors."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import openai
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tests.integration.conftest import PATIENCE_S, Api, Site, poll_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(2400),
]

DRIVER = Path(__file__).parent / "vectors_driver.py"
ROOT = DRIVER.parents[2]
CONTEXTS = {"chat": 1024, "small": 512, "vectors": 256}
"""By the name that clients use."""
DECODES = {"chat": "both-1", "small": "both-2", "vectors": "both-3"}
TEXTS = ["The mill stands by the river.", "A mill beside a river", "Quarterly taxes are due.", "word " * 100, "é"]
SHRUNK = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
START_S = 4 * PATIENCE_S
"""For a machine with other things to do."""


def write_small_model(demo_model, folder):
    """The demo model's tokenizer and chat template, and a shrunken config; vLLM makes up the weights."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (demo_model / name).is_file():
            shutil.copy(demo_model / name, folder)
    config = json.loads((demo_model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SHRUNK))
    return folder


async def own_vectors(demo_model):
    """vLLM's own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(DRIVER),
        str(demo_model),
        str(CONTEXTS["vectors"]),
        msgspec.json.encode(TEXTS).decode(),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    said, _ = await process.communicate()
    (line,) = [line for line in said.decode().splitlines() if line.startswith("vectors ")]
    return np.array(json.loads(line.removeprefix("vectors ")))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(etcd_url, nats_url, tmp_path_factory, demo_model):
    """A client of the gateway, and the vectors that vLLM makes of the texts by itself."""
    site = Site(etcd_url, nats_url, tmp_path_factory.mktemp("models"))
    small = write_small_model(demo_model, site.logs / "small")
    own = {
        "chat": ("--model", str(demo_model)),
        "small": ("--model", str(small), "--load-format", "dummy"),
        "vectors": ("--model", str(demo_model), "--task", "embed"),
    }
    shared = ("--handover", "none", "--dtype", "float32", "--max-batch", "8", "--kv-cache-bytes", str(96 << 20))
    try:
        workers = []
        for model, flags in own.items():
            named = ("--worker-id", DECODES[model], "--served-model-name", model, "--context-length")
            argv = ["workers", *named, str(CONTEXTS[model]), *flags, *shared, *site.flags]
            workers.append(site.start(DECODES[model], argv))
        expected = await own_vectors(demo_model)
        for worker in workers:
            await poll_until(lambda w=worker: w.said("event=worker.ready") or not w.is_running, seconds=START_S)
            assert worker.said("event=worker.ready"), worker.log.read_text()
        gateway = await site.gateway(num_workers=len(own))
        async with Api(gateway.url) as api:
            yield api, expected
    finally:
        site.close()


@pytest.fixture
def api(fleet):
    return fleet[0]


def question(model, text="What is the capital of France?", **fields):
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16, **fields}


async def test_every_model_is_listed_and_served_by_its_own_worker(api):
    listed = (await api.get("/v1/models")).json()["data"]
    assert {model["id"]: model["max_model_len"] for model in listed} == CONTEXTS
    paths = {"chat": "/v1/chat/completions", "small": "/v1/chat/completions", "vectors": "/v1/embeddings"}
    bodies = {name: {"model": name, "input": "a mill"} if name == "vectors" else question(name) for name in paths}
    names = [*paths] * 4
    answers = await asyncio.gather(*(api.post(paths[name], json=bodies[name]) for name in names))
    for name, answer in zip(names, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert (answer.json()["model"], answer.headers["x-headrace-decode"]) == (name, DECODES[name])
    told = {
        name: answer.json()["choices"][0]["message"]["content"]
        for name, answer in zip(names, answers, strict=True)
        if name != "vectors"
    }
    assert told["chat"] == "The capital of France is Paris."
    assert told["small"] != told["chat"]


async def test_what_a_model_does_not_do_is_refused_with_those_that_do(api):
    chat = await api.post("/v1/chat/completions", json=question("vectors"))
    embedding = await api.post("/v1/embeddings", json={"model": "small", "input": "a"})
    for answer, told in ((chat, "generate: 'chat', 'small'."), (embedding, "embed: 'vectors'.")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "wrong_task", "model")
        assert error["message"].endswith(told), error
    unknown = await api.post("/v1/embeddings", json={"model": "mill", "input": "a"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_vectors_are_those_that_vllm_makes_by_itself(fleet, demo_model):
    api, expected = fleet
    answer = await api.post("/v1/embeddings", json={"model": "vectors", "input": TEXTS})
    vectors = np.array([each["embedding"] for each in answer.json()["data"]])
    assert [each["index"] for each in answer.json()["data"]] == [*range(len(TEXTS))]
    assert vectors.shape == expected.shape
    cosines = np.sum(vectors * expected, axis=1)
    assert cosines == pytest.approx(np.ones(len(TEXTS)), abs=1e-4)
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    tokens = [tokenizer.encode(text).ids for text in TEXTS]
    num_tokens = sum(map(len, tokens))
    assert answer.json()["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    by_token = await api.post("/v1/embeddings", json={"model": "vectors", "input": tokens})
    for given, told in zip(by_token.json()["data"], vectors, strict=True):
        assert np.array(given["embedding"]) @ told > 0.9999


async def test_base64_is_the_same_vector(fleet):
    api, expected = fleet
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client:
        raw = await client.embeddings.create(model="vectors", input=TEXTS[0], encoding_format="base64")
        listed = await client.embeddings.create(model="vectors", input=TEXTS[0], encoding_format="float")
    packed = np.frombuffer(base64.b64decode(raw.data[0].embedding), "<f4")
    assert packed == pytest.approx(np.array(listed.data[0].embedding), abs=1e-5)
    assert packed @ expected[0] > 0.9999


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"input": [7] * 257}, "input", "maximum context length is 256 tokens. However, your input has 257"),
        ({"input": "a mill " * 3000}, "input", "maximum context length is 256 tokens"),
        ({"dimensions": 64}, "dimensions", "the vectors of 'vectors' have 576, which cannot be cut"),
        ({"input": ["a", ""]}, "input", "at least one"),
        ({"input": [50_000]}, "input", "50000"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_name(api, fields, param, told):
    answer = await api.post("/v1/embeddings", json={"model": "vectors", "input": "a", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"].split("[")[0]) == (400, param)
    assert told in error["message"]


async def test_an_input_may_take_the_whole_context_and_all_its_dimensions(api):
    body = {"model": "vectors", "input": [7] * CONTEXTS["vectors"], "dimensions": 576}
    answer = await api.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == CONTEXTS["vectors"]
    assert len(answer.json()["data"][0]["embedding"]) == 576
