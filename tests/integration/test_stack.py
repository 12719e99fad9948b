"""One fleet, one gateway: what a request brings, and what it leaves behind."""

import asyncio
import json

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

BLOCK = 16
LONG = "The headrace carries the water to the wheel. " * 40


async def test_headers_name_the_request_and_the_workers_that_served_it(api, pairing, unique):
    local = await api.chat(unique)
    assert local.headers["x-headrace-prefill"] == local.headers["x-headrace-decode"]
    apart = await pairing.chat(unique)
    assert apart.headers["x-headrace-prefill"] == "prefill-1"
    assert apart.headers["x-headrace-decode"].startswith("decode-")
    assert apart.headers["x-headrace-policy"] == "round_robin"
    assert local.headers["x-request-id"] != apart.headers["x-request-id"]
    assert local.json()["id"].endswith(local.headers["x-request-id"])
    async with pairing.stream(unique) as stream:
        assert stream.headers["x-headrace-prefill"] == "prefill-1"
        assert stream.headers["content-type"].startswith("text/event-stream")
        await stream.read()
        assert stream.events[0]["id"].endswith(stream.headers["x-request-id"])


async def test_a_request_may_wish_for_a_handover_or_for_none(api, pairing, alone, unique):
    preference = "x-headrace-handover"
    apart = await api.chat(unique, headers={preference: "always", "x-headrace-explain": "1"})
    assert apart.headers["x-headrace-prefill"] == "prefill-1"
    assert apart.json()["choices"][0]["message"]["content"] == await alone.text(unique)
    assert json.loads(apart.headers["x-headrace-route"])["prefill"] == "prefill-1"
    local = await pairing.chat(unique, headers={preference: "never"})
    assert local.headers["x-headrace-prefill"] == local.headers["x-headrace-decode"] != "prefill-1"
    impossible = await alone.chat(unique, headers={preference: "always"})
    assert impossible.status_code == 503, "there is one worker only"
    misspelt = await api.chat(unique, headers={preference: "maybe"})
    assert (misspelt.status_code, misspelt.json()["error"]["param"]) == (400, preference)


async def test_no_header_is_sent_twice(api, unique):
    for response in (await api.chat(unique), await api.chat(unique, temperature=9), await api.get("/nowhere")):
        names = [name for name, _ in response.headers.multi_items()]
        assert len(names) == len(set(names)), names


@pytest.mark.parametrize("num_characters", [20, 1000, 10_000])
@pytest.mark.parametrize("is_streaming", [False, True])
async def test_an_answer_with_a_handover_is_that_of_one_worker(pairing, alone, unique, num_characters, is_streaming):
    prompt = (unique + LONG * 8)[:num_characters]
    before = await pairing.metric("headrace_handover_bytes_total")
    if is_streaming:
        async with pairing.stream(prompt, max_tokens=64) as stream:
            text = await stream.read()
            assert (stream.is_done, stream.finish) == (True, "length")
    else:
        text = await pairing.text(prompt, max_tokens=64)
    assert text == await alone.text(prompt, max_tokens=64)
    assert await pairing.metric("headrace_handover_bytes_total") - before >= num_characters * 1024
    assert await pairing.metric("headrace_handover_seconds_count") > 0


async def test_a_handover_by_push_gives_the_same_answer(site, reach, alone, unique):
    site.start_worker("prefill-1", "--handover", "push")
    site.start_worker("decode-1", "--handover", "push")
    gateway = await site.gateway("--policy", "round_robin", num_workers=2)
    async with reach(gateway) as pushing:
        for length in (100, 1900):
            response = await pushing.chat((unique + LONG)[:length], max_tokens=64)
            assert response.headers["x-headrace-prefill"] == "prefill-1"
            text = response.json()["choices"][0]["message"]["content"]
            assert text == await alone.text((unique + LONG)[:length], max_tokens=64)
        async with pushing.stream(unique[::-1], max_tokens=64) as stream:
            assert await stream.read() == await alone.text(unique[::-1], max_tokens=64)
        assert await pushing.metric("headrace_handover_bytes_total") > 1900 * 1024


async def test_a_prompt_sent_twice_is_cached_the_second_time(api, unique):
    prompt = unique + LONG
    first = (await api.chat(prompt)).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    decode_cached = await api.cached_tokens(prompt)
    second = (await api.chat(prompt)).json()["usage"]
    whole_blocks = (first["prompt_tokens"] - 1) // BLOCK * BLOCK
    assert second["prompt_tokens_details"]["cached_tokens"] == whole_blocks
    assert max(decode_cached.values()) == whole_blocks
    third = (await api.chat(prompt + " And what else?")).json()["usage"]
    assert third["prompt_tokens_details"]["cached_tokens"] >= len(prompt) // BLOCK * BLOCK
    salted = (await api.chat(prompt, cache_salt="mine")).json()["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


async def test_many_requests_at_once_all_get_their_own_answer(api, pairing, alone, unique):
    prompts = [f"{index} {unique} {LONG[: 37 * index]}" for index in range(24)]
    right, apart, local = await asyncio.gather(
        *(
            asyncio.gather(*(client.text(prompt, max_tokens=40) for prompt in prompts))
            for client in (alone, pairing, api)
        )
    )
    assert apart == local == right
    assert len(set(right)) == len(prompts)


async def test_a_client_that_goes_leaves_nothing_behind(api, pairing, unique, until):
    for asked in (api, pairing):
        async with asked.stream(unique + LONG, max_tokens=25_000) as stream:
            await stream.read(5)
            worker = stream.headers["x-headrace-decode"]
            assert (await asked.fleet())[worker]["num_streams"] == 1
        await until(asked.is_idle)
        assert await asked.metric("headrace_requests_total", code="cancelled") >= 1


async def test_a_client_that_goes_during_the_prefill_leaves_nothing_behind(site, reach, unique, until):
    """30,000 tokens take the prefill worker 30 s."""
    site.start_worker("prefill-1", "--sim-prefill-tokens-per-s", "1000", speedup=1)
    site.start_worker("decode-1")
    gateway = await site.gateway("--policy", "round_robin", num_workers=2)
    async with reach(gateway) as pairing:
        asking = asyncio.create_task(pairing.chat(unique + LONG * 16, max_tokens=10))

        async def is_computing():
            return (await pairing.fleet())["prefill-1"]["num_streams"] > 0

        await until(is_computing)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(pairing.is_idle)


async def test_a_deadline_of_the_client_ends_its_request(api, unique):
    response = await api.chat(unique, max_tokens=25_000, timeout_ms=50)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline"
    async with api.stream(unique, max_tokens=25_000, timeout_ms=3000) as stream:
        await stream.read()
        assert stream.error["code"] == "deadline"
        assert not stream.is_done


async def test_every_decision_can_be_explained(api, unique):
    response = await api.chat(unique)
    explanation = (await api.get(f"/v1/routes/{response.headers['x-request-id']}")).json()
    assert explanation["chosen"]["decode"] == response.headers["x-headrace-decode"]
    assert {option["decode"] for option in explanation["candidates"]} == {"decode-1", "decode-2"}
    assert explanation["observed"]["completion_tokens"] == 16
    assert explanation["observed"]["outcome"] == "finished"
    assert explanation["age_s"] >= 0
    parts = ("queue_s", "prefill_s", "handover_s", "first_step_s", "decode_s", "inflicted_s")
    chosen = explanation["chosen"]
    assert chosen["total_s"] == pytest.approx(sum(chosen[part] for part in parts) - chosen["early_token_discount_s"])
    assert (await api.get("/v1/routes/never-was")).status_code == 404


async def test_a_handed_over_request_tells_where_its_time_went(api, unique):
    response = await api.chat(unique, headers={"x-headrace-handover": "always"})
    told = (await api.get(f"/v1/routes/{response.headers['x-request-id']}")).json()["timeline"]
    stages = {stage["kind"]: stage for stage in told["stages"]}
    assert list(stages) == ["prepare", "queue", "wait", "prefill", "handover", "decode"]
    prefill, decode = response.headers["x-headrace-prefill"], response.headers["x-headrace-decode"]
    assert (stages["prefill"]["worker"], stages["decode"]["worker"]) == (prefill, decode)
    assert (stages["handover"]["source"], stages["handover"]["worker"]) == (prefill, decode)
    assert stages["handover"]["num_bytes"] > 0
    ends = [0.0, *(stage["end_s"] for stage in told["stages"])]
    assert [stage["begin_s"] for stage in told["stages"]] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(told["end_s"])
    assert told["code"] == "ok"
    assert float(response.headers["x-headrace-overhead-ms"]) == pytest.approx(told["overhead_s"] * 1e3, abs=0.001)
    assert 0 < told["overhead_s"] <= stages["queue"]["end_s"]
    assert "x-headrace-overhead-ms" in (await api.post("/v1/chat/completions", json={})).headers
    listed = (await api.get("/v1/routes", params={"limit": 1000})).json()["data"]
    assert told["request"] in [each["request"] for each in listed]


async def test_operators_can_ask(api, stack):
    assert (await api.get("/live")).json() == {"status": "ok"}
    assert (await api.get("/health")).json() == {"status": "ok", "workers": 3}
    fleet = await api.fleet()
    assert {name: worker["role"] for name, worker in fleet.items()} == {
        "prefill-1": "prefill",
        "decode-1": "decode",
        "decode-2": "decode",
    }
    assert all(worker["is_connected"] and worker["state"] == "ready" for worker in fleet.values())
    assert all(worker["facts"]["num_blocks"] == 8192 for worker in fleet.values())
    table = stack.site.start("fleet", ["app.cli", "fleet", "--once", *stack.site.flags], {"COLUMNS": "300"})
    assert await table.ended() == 0
    lines = table.log.read_text().splitlines()
    for name, worker in fleet.items():
        (line,) = [line for line in lines if name in line]
        assert worker["address"] in line
        assert "8192" in line, "its load report is there"
