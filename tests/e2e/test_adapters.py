"""Two LoRA adapters on real vLLM, of a model out of the hub's cache; one prefill and one decode worker."""

import httpx
import pytest

from tests.adapters import write_random_adapter
from tests.e2e.shallow_model import write_shallow_model
from tests.e2e.stack import Stack
from tests.hub_cache import write_hub_cache

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

MODEL = "org/smol"
PROMPT = "The mill stands by the river, and whoever comes along the road hears its wheel long before seeing it. " * 4


@pytest.fixture(scope="module")
def stack(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_hub_cache(folder / "hf", MODEL, write_shallow_model(demo_model, folder / "shallow", num_layers=6))
    engine = "--enable-lora --max-loras 2 --max-lora-rank 8 --dtype float32 --max-model-len 1024"
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HEADRACE_ENGINE_ARGS": engine}
    stack = Stack(folder, "--model", MODEL, env=environment)
    try:
        yield stack.wait_until_ready()
    finally:
        assert stack.stop() == 0


def load(stack, name, directory):
    body = {"lora_name": name, "lora_path": str(directory)}
    return httpx.post(f"{stack.url}/v1/load_lora_adapter", json=body, timeout=600)


def answer(stack, model, handover, *, salt=""):
    """Its text, and how much of the prompt was cached."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    reply = stack.post("/v1/completions", body | ({"cache_salt": salt} if salt else {}), handover=handover)
    assert reply.status_code == 200, reply.text
    served_by = {reply.headers[f"x-headrace-{leg}"] for leg in ("prefill", "decode")}
    assert len(served_by) == (2 if handover == "always" else 1)
    usage = reply.json()["usage"]
    return reply.json()["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"]


def test_adapters_change_the_model_alike_on_one_worker_and_over_two(stack, tmp_path):
    listed = httpx.get(f"{stack.url}/v1/models", timeout=600).json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in listed] == [(MODEL, 1024)]
    for seed, name in enumerate(("poet", "clerk")):
        directory = write_random_adapter(tmp_path / name, snapshot_of(stack), seed=seed)
        loaded = load(stack, name, directory)
        assert (loaded.status_code, loaded.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    handed = {model: answer(stack, model, "always") for model in (MODEL, "poet", "clerk")}
    assert [cached for _, cached in handed.values()] == [0, 0, 0], "blocks of one are no other's"
    assert len({text for text, _ in handed.values()}) == 3
    for model, (text, _) in handed.items():
        assert answer(stack, model, "never", salt="elsewhere") == (text, 0)
        again, cached = answer(stack, model, "never")
        assert (again, cached > 0) == (text, True)

    third = load(stack, "third", tmp_path / "poet")
    assert "keeps 2 adapters and has 2" in third.json()["error"]["message"]
    broken = load(stack, "poet", tmp_path / "nowhere")
    assert broken.status_code == 400
    assert answer(stack, "poet", "always")[0] == handed["poet"][0]
    gone = httpx.post(f"{stack.url}/v1/unload_lora_adapter", json={"lora_name": "poet"}, timeout=600)
    assert gone.status_code == 200
    missing = stack.post("/v1/completions", {"model": "poet", "prompt": "x"}, handover="never")
    assert missing.json()["error"]["code"] == "model_not_found"
    assert answer(stack, "clerk", "always")[0] == handed["clerk"][0]


def snapshot_of(stack):
    (snapshot,) = (stack.state.parent / "hf" / "hub" / "models--org--smol" / "snapshots").iterdir()
    return snapshot
