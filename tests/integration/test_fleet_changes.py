"""Workers and gateways come, go and die; clients notice nothing, or are told."""

import asyncio
import signal

import pytest

from tests.integration.conftest import refuses

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def test_a_stopped_worker_finishes_its_streams_and_is_gone_at_once(site, reach, alone, unique, until):
    for name in ("decode-1", "decode-2"):
        site.start_worker(name, speedup=0.5)
    gateway = await site.gateway(num_workers=2)
    workers = {process.name: process for process in site.processes}
    async with reach(gateway) as api, api.stream(unique, max_tokens=500) as stream:
        await stream.read(5)
        stopped = stream.headers["x-headrace-decode"]
        (other,) = {"decode-1", "decode-2"} - {stopped}
        workers[stopped].send(signal.SIGTERM)

        async def is_draining():
            return (await api.fleet())[stopped]["state"] == "draining"

        await until(is_draining)
        for index in range(4):
            assert (await api.chat(f"{index} {unique}")).headers["x-headrace-decode"] == other
        assert await stream.read() == await alone.text(unique, max_tokens=500)
        assert (stream.is_done, stream.finish) == (True, "length")
        assert await workers[stopped].ended() == 0

        async def is_gone():
            return set(await api.fleet()) == {other}

        await until(is_gone, seconds=8)  # its lease would have lasted 10 s
        assert await api.metric("headrace_migrations_total") == 0
        await _a_new_worker_takes_traffic(site, api, workers[other], unique, until)


async def _a_new_worker_takes_traffic(site, api, other, unique, until):
    await site.worker("both-3")

    async def is_connected():
        return (await api.fleet()).get("both-3", {}).get("is_connected")

    await until(is_connected)
    other.send(signal.SIGTERM)
    await other.ended()
    response = await api.chat(unique)
    assert response.status_code == 200
    assert response.headers["x-headrace-decode"] == "both-3"


@pytest.mark.parametrize("policy", ["headrace", "round_robin"])
async def test_the_streams_of_a_killed_worker_go_on_elsewhere_at_the_very_token(
    site, reach, alone, unique, until, policy
):
    names = ("prefill-1", "decode-1", "decode-2")
    for name in names:
        site.start_worker(name, speedup=2)
    gateway = await site.gateway("--policy", policy, num_workers=3)
    workers = {process.name: process for process in site.processes}
    prompts = [f"{index} {unique}" for index in range(6)]
    async with reach(gateway) as api:
        begun = [asyncio.Event() for _ in prompts]
        served, routes = {}, {}

        async def read(index):
            async with api.stream(prompts[index], max_tokens=600) as stream:
                await stream.read(20)
                served[index] = stream.headers["x-headrace-decode"]
                begun[index].set()
                text = await stream.read()
                assert (stream.is_done, stream.finish, stream.error) == (True, "length", None)
                routes[index] = (await api.get(f"/v1/routes/{stream.headers['x-request-id']}")).json()
                return text

        reading = [asyncio.create_task(read(index)) for index in range(len(prompts))]
        whole = asyncio.create_task(api.text(unique, max_tokens=600))
        await asyncio.gather(*(event.wait() for event in begun))
        killed = served[0]
        workers[killed].kill()
        texts = await asyncio.gather(*reading, whole)
        assert texts == await asyncio.gather(*(alone.text(prompt, max_tokens=600) for prompt in [*prompts, unique]))
        num_lost = sum(worker == killed for worker in served.values())
        assert num_lost >= 1
        assert await api.metric("headrace_migrations_total") >= num_lost
        _tells_of_both(routes[0], killed)
        assert killed not in {(await api.chat(unique)).headers["x-headrace-decode"] for _ in range(4)}

        async def is_gone():
            return set(await api.fleet()) == set(names) - {killed}

        await until(is_gone)
        await until(api.is_idle)


def _tells_of_both(route, killed):
    """The attempt that was lost, and the one that went on."""
    (first,) = route["earlier"]
    assert (first["attempt"], route["attempt"]) == (1, 2)
    assert first["chosen"]["decode"] == killed != route["chosen"]["decode"]
    assert first["candidates"]
    assert first["age_s"] > route["age_s"]
    assert first["observed"]["outcome"] == "interrupted"
    assert first["observed"]["failure"]["worker"] == killed
    assert first["observed"]["failure"]["code"] == "worker_lost"
    assert (route["observed"]["outcome"], route["observed"]["failure"]) == ("finished", None)
    assert first["observed"]["completion_tokens"] + route["observed"]["completion_tokens"] == 600


async def test_a_prefill_worker_that_dies_over_a_prompt_is_replaced(site, reach, alone, unique, until):
    site.start_worker("prefill-1", "--sim-prefill-tokens-per-s", "20", speedup=1)
    site.start_worker("decode-1")
    gateway = await site.gateway("--policy", "round_robin", num_workers=2)
    async with reach(gateway) as api:
        asking = asyncio.create_task(api.chat(unique))

        async def is_computing():
            return (await api.fleet())["prefill-1"]["num_streams"] == 1

        await until(is_computing)
        site.processes[0].kill()
        response = await asking
        assert response.status_code == 200, response.text
        assert response.headers["x-headrace-prefill"] == response.headers["x-headrace-decode"] == "decode-1"
        assert response.headers["x-headrace-fallback"]
        assert response.json()["choices"][0]["message"]["content"] == await alone.text(unique)
        assert await api.metric("headrace_retries_total") == 1


async def test_a_begun_answer_waits_until_its_only_worker_is_back(site, reach, alone, unique, until):
    worker = site.start_worker("both-1", speedup=2)
    gateway = await site.gateway(num_workers=1)
    async with reach(gateway) as api:
        whole = asyncio.create_task(api.text(unique, max_tokens=400))
        async with api.stream(unique, max_tokens=400) as stream:
            await stream.read(5)
            worker.kill()
            await until(lambda: gateway.process.said("request.waits_for_worker"))
            await site.worker("both-1", speedup=2)
            assert await stream.read() == await whole == await alone.text(unique, max_tokens=400)
            assert (stream.is_done, stream.finish) == (True, "length")
        assert await api.metric("headrace_migrations_total") == 2
        assert await api.metric("headrace_replacement_waits_total", outcome="replaced") == 2


async def test_without_a_worker_the_client_is_told_so(site, reach, unique, until):
    worker = site.start_worker("both-1")
    gateway = await site.gateway(num_workers=1)
    async with reach(gateway) as api:
        assert (await api.chat(unique)).status_code == 200
        worker.kill()

        async def is_lost():
            return not (await api.fleet())["both-1"]["is_connected"]

        await until(is_lost)
        for is_streaming in (False, True):
            response = await api.chat(unique, stream=is_streaming)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            error = response.json()["error"]
            assert (error["code"], error["type"], error["param"]) == ("no_worker", "server_overloaded", None)
            assert "'sim'" in error["message"]
        assert (await api.get("/health")).status_code == 503
        await site.worker("both-1")  # under the same name, before the lease of the old one ends

        async def is_served():
            return (await api.chat(unique)).status_code == 200

        await until(is_served)


async def test_a_stopping_gateway_ends_its_streams_and_takes_no_new_ones(site, reach, alone, unique, until):
    site.start_worker("both-1", speedup=2)
    gateway = await site.gateway(num_workers=1)
    async with reach(gateway) as api:
        async with api.stream(unique, max_tokens=500) as stream:
            await stream.read(5)
            gateway.process.send(signal.SIGTERM)

            await until(lambda: refuses(gateway.url))
            assert await stream.read() == await alone.text(unique, max_tokens=500)
            assert stream.is_done
        assert await gateway.process.ended() == 0
    again = await site.gateway(num_workers=1)
    async with reach(again) as api:
        await until(api.is_idle)


@pytest.mark.parametrize("is_hurried", [False, True])
async def test_what_outlasts_the_gateways_patience_is_told_so(site, reach, unique, until, is_hurried):
    site.start_worker("both-1", speedup=1)
    gateway = await site.gateway("--drain-s", "60" if is_hurried else "1", num_workers=1)
    async with reach(gateway) as api, api.stream(unique, max_tokens=20_000) as stream:
        await stream.read(5)
        gateway.process.send(signal.SIGINT)
        if is_hurried:
            await until(lambda: refuses(gateway.url))
            gateway.process.send(signal.SIGINT)
        await stream.read()
        assert stream.error["code"] == "gateway_stopping"
        assert not stream.is_done
        assert await gateway.process.ended() == 0
