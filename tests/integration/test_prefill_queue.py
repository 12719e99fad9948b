"""Prompts that go through the JetStream queue, and are computed by whoever has room."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import pytest

from app.cli.servers import nats_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

QUEUE = ("--prefill-dispatch", "queue")
SLOW = (
    "--sim-prefill-tokens-per-s",
    "400",
    "--max-step-tokens",
    "64",
    "--max-batch",
    "32",
)  # 0.2 s for a prompt; the queue is looked at every second


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


async def test_a_burst_is_served_by_all_who_pull(site, reach, alone, unique, until):
    for name in ("prefill-1", "prefill-2"):
        site.start_worker(name, *QUEUE, "--pull-ahead", "1", *SLOW, speedup=1)
    site.start_worker("decode-1")
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=3)
    prompts = [f"{index} {unique}" for index in range(32)]
    async with reach(gateway) as api:
        asking = [asyncio.create_task(api.chat(prompt)) for prompt in prompts]

        async def is_deep():
            return await api.metric("headrace_prefill_queue_depth", model="sim") >= 2

        async def is_old():
            return await api.metric("headrace_prefill_queue_oldest_seconds", model="sim") > 0

        await until(is_deep)
        await until(is_old)
        assert await api.metric("headrace_prefill_queue_in_progress", model="sim") >= 1
        responses = await asyncio.gather(*asking)
        assert [content(response) for response in responses] == await asyncio.gather(
            *(alone.text(prompt) for prompt in prompts)
        )
        served = [response.headers["x-headrace-prefill"] for response in responses]
        assert {"prefill-1", "prefill-2"} == set(served)
        assert all("x-headrace-fallback" not in response.headers for response in responses)
        assert await api.metric("headrace_handover_bytes_total") > 0
        assert await api.metric("headrace_prefill_queue_bypasses_total") == 0

        async def is_empty():
            return (
                await api.metric("headrace_prefill_queue_depth")
                + await api.metric("headrace_prefill_queue_in_progress")
            ) == 0

        await until(is_empty)
        await until(api.is_idle)


@pytest.mark.parametrize("length", [79, 400])
async def test_a_stream_goes_on_from_the_first_token_of_whoever_took_the_prompt(site, reach, alone, unique, length):
    for name in ("prefill-1", "decode-1"):
        site.start_worker(name, *QUEUE)
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=2)
    prompt = (unique * 8)[:length]
    async with reach(gateway) as api:
        async with api.stream(prompt, max_tokens=50) as stream:
            assert stream.headers["x-headrace-prefill"] == "prefill-1"
            assert await stream.read() == await alone.text(prompt, max_tokens=50)
            assert (stream.is_done, stream.finish) == (True, "length")
        assert content(await api.chat(prompt, max_tokens=1)) == await alone.text(prompt, max_tokens=1)


async def test_a_worker_that_takes_its_own_prompt_goes_on_alone(site, reach, alone, unique):
    """Both decode and pull: whoever decodes may be the one who took the prompt."""
    for name in ("both-1", "both-2"):
        site.start_worker(name, *QUEUE)
    gateway = await site.gateway(*QUEUE, num_workers=2)
    async with reach(gateway) as api:
        for index in range(12):
            headers = {"x-headrace-handover": "always"}
            prompt = f"{index} {unique}"
            response = await api.post("/v1/chat/completions", json=api.body(prompt), headers=headers)
            assert content(response) == await alone.text(prompt)
            async with api.stream(prompt[::-1]) as stream:
                assert await stream.read() == await alone.text(prompt[::-1])


async def test_jobs_of_a_killed_worker_are_done_by_another(site, reach, alone, unique, until):
    """A prompt takes the first worker 2 s: it dies over those that it has taken."""
    site.start_worker("prefill-1", *QUEUE, "--pull-ahead", "4", "--sim-prefill-tokens-per-s", "40", speedup=1)
    site.start_worker("decode-1")
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=2)
    prompts = [f"{index} {unique}" for index in range(8)]
    async with reach(gateway) as api:
        asking = [asyncio.create_task(api.chat(prompt)) for prompt in prompts]

        async def is_held():
            return await api.metric("headrace_prefill_queue_in_progress", model="sim") >= 4

        await until(is_held)
        await site.worker("prefill-2", *QUEUE)
        site.processes[0].send(signal.SIGKILL)
        responses = await asyncio.gather(*asking)
        texts = [content(response) for response in responses]
        assert texts == await asyncio.gather(*(alone.text(prompt) for prompt in prompts))
        assert "prefill-2" in {response.headers["x-headrace-prefill"] for response in responses}
        await until(api.is_idle)


async def test_jobs_of_a_stopping_worker_are_done_and_no_new_ones_taken(site, reach, alone, unique, until):
    for name in ("prefill-1", "prefill-2"):
        site.start_worker(name, *QUEUE, *SLOW, speedup=1)
    site.start_worker("decode-1")
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=3)
    async with reach(gateway) as api:
        prompts = [f"{index} {unique}" for index in range(32)]
        asking = [asyncio.create_task(api.chat(prompt)) for prompt in prompts]

        async def is_held():
            return await api.metric("headrace_prefill_queue_in_progress", model="sim") >= 2

        await until(is_held)
        site.processes[0].send(signal.SIGTERM)
        texts = [content(response) for response in await asyncio.gather(*asking)]
        assert texts == await asyncio.gather(*(alone.text(prompt) for prompt in prompts))
        assert await site.processes[0].ended() == 0
        assert await api.metric("headrace_retries_total") == 0


async def test_workers_that_are_frozen_and_told_to_stop_end_and_their_jobs_go_elsewhere(
    site, reach, alone, unique, until
):
    """What they find when they go on: a signal, jobs that came meanwhile, connections that have been given up."""
    frozen = [site.start_worker(f"prefill-{number}", *QUEUE) for number in range(1, 4)]
    site.start_worker("decode-1")
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", "--dead-after-s", "6", num_workers=4)
    async with reach(gateway) as api:
        for process in frozen:
            process.send(signal.SIGSTOP)
        prompts = [f"{index} {unique}" for index in range(8)]
        asking = [asyncio.create_task(api.chat(prompt)) for prompt in prompts]

        async def is_held():
            return await api.metric("headrace_prefill_queue_in_progress", model="sim") >= 3

        await until(is_held)  # sent to those who asked for the next one, and cannot know
        await site.worker("prefill-4", *QUEUE)
        for process in frozen:
            process.send(signal.SIGTERM)
        texts = [content(response) for response in await asyncio.gather(*asking)]

        async def are_given_up():
            fleet = await api.fleet()
            return not any(fleet[process.name]["is_connected"] for process in frozen if process.name in fleet)

        await until(are_given_up)
        for process in frozen:
            process.send(signal.SIGCONT)
        assert [await process.ended() for process in frozen] == [0, 0, 0]
        assert texts == await asyncio.gather(*(alone.text(prompt) for prompt in prompts))
        await until(api.is_idle)


async def test_a_worker_whose_clock_is_ahead_computes_what_is_queued(site, reach, alone, unique, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time\ntell = time.time\ntime.time = lambda: tell() + 3600\n")
    own = ["--role", "prefill", "--worker-id", "prefill-1", "--engine", "sim", "--speedup", "10"]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    site.start("prefill-1", ["workers", *own, *site.flags, *QUEUE], env=os.environ | {"PYTHONPATH": paths})
    site.start_worker("decode-1")
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=2)
    async with reach(gateway) as api:
        body = api.body(unique) | {"timeout_ms": 20_000}
        response = await api.post("/v1/chat/completions", json=body)
        assert content(response) == await alone.text(unique)
        assert response.headers["x-headrace-prefill"] == "prefill-1"
        assert "x-headrace-fallback" not in response.headers


async def test_without_somebody_who_pulls_prompts_are_sent_directly_and_it_is_said(site, reach, alone, unique):
    for name in ("prefill-1", "decode-1"):
        site.start_worker(name)
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=2)
    async with reach(gateway) as api:
        response = await api.chat(unique)
        assert content(response) == await alone.text(unique)
        assert response.headers["x-headrace-prefill"] == "prefill-1"
        assert response.headers["x-headrace-fallback"] == "prefill_queue_unserved"
        assert await api.metric("headrace_prefill_queue_bypasses_total", code="prefill_queue_unserved") == 1
        await gateway.process.says("event=prefill_queue.bypassed")


async def test_a_client_that_goes_leaves_no_job_behind(site, reach, alone, unique, until):
    """Those that wait in the queue are given up first, and it is known before the worker has room for another one."""
    slow = ("--sim-prefill-tokens-per-s", "4", "--max-step-tokens", "8", "--max-batch", "8")
    site.start_worker("prefill-1", *QUEUE, "--pull-ahead", "1", *slow, speedup=1)
    site.start_worker("decode-1")
    gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=2)
    async with reach(gateway) as api:

        async def are_held():
            return await api.metric("headrace_prefill_queue_in_progress", model="sim") >= 2

        async def are_queued():
            return await api.metric("headrace_prefill_queue_depth", model="sim") >= 3

        async def are_given_up():
            return await api.metric("headrace_requests_total", code="cancelled") == 3

        held = [asyncio.create_task(api.chat(f"{index} {unique}")) for index in range(2)]
        await until(are_held)
        queued = [asyncio.create_task(api.chat(f"{index} {unique}")) for index in range(2, 5)]
        await until(are_queued)
        for request in queued:
            request.cancel()
        await until(are_given_up)
        for request in held:
            request.cancel()
        await asyncio.gather(*held, *queued, return_exceptions=True)

        async def is_empty():
            return (
                await api.metric("headrace_prefill_queue_depth")
                + await api.metric("headrace_prefill_queue_in_progress")
            ) == 0

        await until(is_empty)
        await until(api.is_idle)
        assert site.processes[0].log.read_text().count("event=prefill_job.dropped") == 3


async def test_without_nats_prompts_are_sent_directly_until_it_is_back(site, reach, alone, unique, until, tmp_path):
    """What is in the queue when NATS goes is sent directly, too."""
    async with AsyncExitStack() as servers:
        first = await servers.enter_async_context(nats_server(tmp_path / "nats"))
        site.nats = first.url
        site.start_worker("prefill-1", *QUEUE, "--pull-ahead", "1", *SLOW, speedup=1)
        site.start_worker("decode-1")
        gateway = await site.gateway(*QUEUE, "--policy", "round_robin", num_workers=2)
        prompts = [f"{index} {unique}" for index in range(6)]
        async with reach(gateway) as api:
            asking = [asyncio.create_task(api.chat(prompt)) for prompt in prompts]

            async def is_queued():
                return await api.metric("headrace_prefill_queue_depth", model="sim") >= 1

            await until(is_queued)
            await servers.aclose()
            responses = await asyncio.gather(*asking)
            texts = [content(response) for response in responses]
            assert texts == await asyncio.gather(*(alone.text(prompt) for prompt in prompts))
            codes = {response.headers.get("x-headrace-fallback") for response in responses}
            assert "event_plane_unavailable" in codes
            response = await api.chat(unique)
            assert (content(response), response.headers["x-headrace-fallback"]) == (
                await alone.text(unique),
                "event_plane_unavailable",
            )
            await servers.enter_async_context(nats_server(tmp_path / "nats", first.port))

            async def is_queued_again():
                return "x-headrace-fallback" not in (await api.chat(unique)).headers

            await until(is_queued_again)
            await until(api.is_idle)
        site.close()
