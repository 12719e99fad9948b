"""Workers of one name that disagree on what it is: nobody is told that it is their own mistake."""

import json
from collections import Counter

import pytest

from workers.settings import SIM_MODEL

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LONG = "word " * 400


async def test_workers_that_come_back_with_another_block_size_are_served(site, reach, unique):
    first = await site.worker("both-1", "--block-size", "16")
    gateway = await site.gateway(num_workers=1)
    async with reach(gateway) as api:
        assert (await api.chat(unique)).status_code == 200
        first.popen.terminate()
        await first.ended()
        site.start_worker("both-2", "--block-size", "32")
        await site.ready(gateway, 1)
        assert (await api.chat(unique)).status_code == 200
        assert (await api.fleet())["both-2"]["facts"]["block_size"] == 32


@pytest.mark.parametrize("order", [("1024", "8192"), ("8192", "1024")])
async def test_a_prompt_goes_where_it_has_room(site, reach, unique, order):
    for index, length in enumerate(order):
        await site.worker(f"both-{index}", "--context-length", length)
    gateway = await site.gateway(num_workers=2)
    async with reach(gateway) as api:
        large = f"both-{order.index('8192')}"
        for number in range(6):
            response = await api.chat(f"{number} {unique} {LONG}")
            assert (response.status_code, response.headers.get("x-headrace-decode")) == (200, large), response.text
        assert (await api.chat(f"{unique} {LONG * 5}")).status_code == 400


async def test_two_models_under_one_name_are_told_apart(site, reach, unique, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in SIM_MODEL.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages[0].content }}!"}))
    (other / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("both-1", "both-2"):
        await site.worker(name, "--served-model-name", "m")
    await site.worker("both-3", "--served-model-name", "m", "--model", str(other))
    gateway = await site.gateway(num_workers=3)
    async with reach(gateway) as api:
        served = Counter()
        for number in range(12):
            response = await api.chat(f"{number} {unique}", model="m")
            served[response.status_code, response.headers.get("x-headrace-decode")] += 1
        assert set(served) <= {(200, "both-1"), (200, "both-2")}, served
        told = (await api.get("/v1/fleet")).json()
        assert [card["num_workers"] for card in told["models"] if card["is_current"]] == [2]
        assert "model 'm' has 2 different cards" in told["warnings"][0]
        assert await api.metric("headrace_model_cards", model="m") == 2
        await gateway.process.says("event=fleet.split")


async def test_kv_caches_that_do_not_fit_are_not_handed_over(site, reach, unique):
    await site.worker("decode-1", "--sim-kv-bytes-per-token", "2048", "--sim-prefill-tokens-per-s", "1000")
    await site.worker("prefill-1")
    gateway = await site.gateway(num_workers=2)
    async with reach(gateway) as api:
        for number in range(3):
            response = await api.chat(f"{number} {unique} {LONG * 3}")
            assert response.status_code == 200, response.text
            assert response.headers["x-headrace-prefill"] == "decode-1"
        (warning,) = (await api.get("/v1/fleet")).json()["warnings"]
        assert "model 'sim' has 2 KV cache layouts" in warning
