"""`headrace gateway --processes 2`: two processes on one port look like one gateway."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import httpx
import pytest

from loadtest.workloads import read_trace
from tests.integration.conftest import refuses

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
async def two(site, reach, until):
    site.start_worker("both-1", speedup=4)
    gateway = await site.gateway("--processes", "2", num_workers=1)
    async with reach(gateway) as api:
        await until(lambda: _num_answering(api, 2))
    return gateway


async def _num_answering(api, count):
    health = await api.get("/health")
    return health.status_code == 200 and health.json()["processes"] == count


async def _one_of_each(open_api, gateway):
    """For each process a client whose connection is with it, by the process's id."""
    clients = {}
    async with AsyncExitStack() as others:
        while len(clients) < 2:
            api = await others.enter_async_context(open_api(gateway))
            process = (await api.get("/v1/fleet")).json()["process"]
            assert process["of"] == 2
            clients.setdefault(process["pid"], api)
        kept = others.pop_all()
    return clients, kept


async def test_both_serve_and_any_of_them_tells_of_all(two, reach, unique, until):
    clients, opened = await _one_of_each(reach, two)
    async with opened:
        assert two.process.pid not in clients  # the parent serves nothing
        one, other = clients.values()
        answers = [await api.chat(f"{unique} {number}") for number in range(3) for api in (one, other)]
        answers.append(await one.chat(unique))
        assert {answer.status_code for answer in answers} == {200}
        for api in (one, other):
            assert await api.metric("headrace_requests_total", code="ok") == len(answers)
            assert await api.metric("headrace_ttft_seconds_count") == len(answers)
            assert await api.metric("headrace_workers", stream="up") == 1
            told = [(await api.get(f"/v1/routes/{each.headers['x-request-id']}")).json() for each in answers]
            assert all(each["timeline"]["completion_tokens"] == 16 for each in told)
            listed = (await api.get("/v1/routes")).json()["data"]
            assert [each["request"] for each in listed] == [each.headers["x-request-id"] for each in reversed(answers)]
        assert (await one.get("/v1/routes/unheard-of")).status_code == 404
        response = (await one.post("/v1/responses", json={"model": "sim", "input": unique})).json()
        assert (await other.get(f"/v1/responses/{response['id']}")).json()["output"] == response["output"]


async def test_one_that_is_killed_ends_its_own_streams_and_comes_back(two, reach, alone, unique, until):
    clients, opened = await _one_of_each(reach, two)
    async with opened:
        (lost, doomed), (well, other) = clients.items()
        await asyncio.gather(doomed.chat(unique), other.chat(unique))
        assert await other.metric("headrace_requests_total") == 2
        async with doomed.stream(unique, max_tokens=4000) as broken, other.stream(unique, max_tokens=4000) as stream:
            await asyncio.gather(broken.read(5), stream.read(5))
            os.kill(lost, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await broken.read()
            assert await stream.read() == await alone.text(unique, max_tokens=4000)
            assert stream.is_done
        assert "status=-9" in await two.process.says("event=process.ended")
        await until(lambda: _num_answering(other, 2))
        again, opened_again = await _one_of_each(reach, two)
        async with opened_again:
            assert well in again
            assert lost not in again
            (back,) = (api for pid, api in again.items() if pid != well)
            assert (await back.chat(unique)).status_code == 200
            # What had been told before is not taken back: two, the stream that went on, and this one.
            assert [await api.metric("headrace_requests_total") for api in again.values()] == [4, 4]


async def test_asked_to_end_both_end_their_streams_and_the_status_is_0(two, reach, alone, unique, until):
    clients, opened = await _one_of_each(reach, two)
    async with opened, AsyncExitStack() as streams:
        running = [
            await streams.enter_async_context(api.stream(f"{unique} {number}", max_tokens=300))
            for number in range(4)
            for api in clients.values()
        ]
        await asyncio.gather(*(stream.read(5) for stream in running))
        two.process.send(signal.SIGTERM)
        await until(lambda: refuses(two.url))
        await asyncio.gather(*(stream.read() for stream in running))
        assert all(stream.is_done and len(stream.text) == 300 for stream in running)
        assert running[0].text == await alone.text(f"{unique} 0", max_tokens=300)
    assert await two.process.ended() == 0
    assert two.process.said("event=process.ended") is None


async def test_what_none_of_them_can_use_ends_all_and_a_port_is_one_gateway_s(site, two):
    port = two.url.rpartition(":")[2]
    second = site.start("gateway", ["app.cli", "gateway", "--port", port, "--processes", "2", *site.flags])
    assert await second.ended() == 2
    assert "cannot be listened on" in second.log.read_text()
    unusable = site.start_gateway("--processes", "2", "--policy", "no_such_policy").process
    assert await unusable.ended() == 2
    assert "no_such_policy" in unusable.log.read_text()


async def test_what_they_record_is_one_trace_that_shares_what_was_shared(site, reach, until, unique, tmp_path):
    site.start_worker("both-1", speedup=50)
    folder = tmp_path / "recorded"
    gateway = await site.gateway("--processes", "2", "--record", str(folder), num_workers=1)
    async with reach(gateway) as api:
        await until(lambda: _num_answering(api, 2))
    clients, opened = await _one_of_each(reach, gateway)
    async with opened:
        for api in clients.values():
            assert (await api.chat(unique * 100)).status_code == 200
        gateway.process.send(signal.SIGTERM)
    assert await gateway.process.ended() == 0
    one, other = read_trace(folder, block_size=512, seed=0).sessions
    assert len(one.turns[0].blocks) > 1
    assert one.turns[0].blocks.tolist() == other.turns[0].blocks.tolist()
