"""LoRA adapters of a simulated fleet: loaded and unloaded over HTTP, addressed as models, handed over, migrated."""

import pytest

from tests.adapters import write_named_adapter

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROMPT = "Tell me something about rivers, mills and wheels, and about all that is between them. " * 3
ALWAYS, NEVER = ({"x-headrace-handover": each} for each in ("always", "never"))


async def load(api, name, directory, **more):
    return await api.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(directory), **more})


async def listed(api):
    return {each["id"]: each.get("parent") for each in (await api.get("/v1/models")).json()["data"]}


async def test_adapters_are_models_of_every_gateway_and_every_worker(site, reach, until, tmp_path):
    await site.worker("prefill-1")
    await site.worker("decode-1")
    async with reach(await site.gateway(num_workers=2)) as api, reach(await site.gateway(num_workers=2)) as other:
        for name in ("poet", "clerk"):
            answer = await load(api, name, write_named_adapter(tmp_path / name))
            assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
        await until(lambda: _is_listed(other, {"sim": None, "clerk": "sim", "poet": "sim"}))
        assert (await api.get("/v1/models/poet")).json()["parent"] == "sim"
        texts = {model: await api.text(PROMPT, model=model, headers=NEVER) for model in ("sim", "poet", "clerk")}
        assert len(set(texts.values())) == 3
        for model, text in texts.items():  # other blocks, of which the decode worker has none
            handed = await other.chat(PROMPT, model=model, headers=ALWAYS)
            assert handed.headers["x-headrace-prefill"] == "prefill-1"
            assert (handed.json()["model"], handed.json()["choices"][0]["message"]["content"]) == (model, text)
        again = await api.chat(PROMPT, model="poet", headers=NEVER)
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        for model in ("sim", "poet"):
            await until(lambda model=model: _knows_blocks(api, model))
        assert (await load(api, "poet", tmp_path / "poet")).status_code == 400
        assert (await load(api, "sim", tmp_path / "poet")).status_code == 400
        refused = await load(api, "nobody", tmp_path / "nowhere")
        assert refused.status_code == 400
        assert "is not the directory of an adapter" in refused.json()["error"]["message"]
        assert set(await listed(api)) == {"sim", "clerk", "poet"}


async def _is_listed(api, models):
    return await listed(api) == models


async def _knows_blocks(api, model):
    return (await api.cached_tokens(PROMPT, model=model))["decode-1"] > 0


async def test_a_worker_that_comes_later_loads_it_and_goes_on_where_another_died(site, reach, until, tmp_path):
    first = await site.worker("both-1", speedup=0.5)
    async with reach(await site.gateway(num_workers=1)) as api:
        assert (await load(api, "poet", write_named_adapter(tmp_path / "poet"))).status_code == 200
        async with api.stream(PROMPT, model="poet", max_tokens=200) as stream:
            await stream.read(10)
            second = await site.worker("both-2")
            await second.says("adapter.loaded")
            await until(lambda: _num_workers(api, 2))
            first.kill()
            text = await stream.read()
        assert (stream.error, stream.finish) == (None, "length")
        assert text == await api.text(PROMPT, model="poet", max_tokens=200)


async def _num_workers(api, number):
    return (await api.get("/health")).json()["workers"] == number


async def test_what_is_unloaded_is_not_found_and_its_streams_end_as_they_would(site, reach, tmp_path):
    await site.worker("both-1", speedup=0.5)
    async with reach(await site.gateway(num_workers=1)) as api:
        assert (await load(api, "poet", write_named_adapter(tmp_path / "poet"))).status_code == 200
        whole = await api.text(PROMPT, model="poet", max_tokens=60)
        async with api.stream(PROMPT, model="poet", max_tokens=60) as stream:
            await stream.read(10)
            done = await api.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
            assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
            refused = await api.chat(PROMPT, model="poet")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
            assert await stream.read() == whole
        assert set(await listed(api)) == {"sim"}
        again = await api.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
        assert again.json()["error"]["code"] == "model_not_found"
