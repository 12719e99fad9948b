"""etcd or NATS stops and comes back under traffic: no request fails, and what was missed is caught up on."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from app.cli.servers import etcd_server, nats_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


class Traffic:
    """Asks one thing after another, three at a time, until the block ends; every answer must be right."""

    def __init__(self, api, name):
        self.api, self.name, self.num_answers, self.is_over = api, name, 0, False

    async def __aenter__(self):
        self.tasks = [asyncio.create_task(self.ask(i)) for i in range(3)]
        return self

    async def __aexit__(self, *_):
        self.is_over = True
        await asyncio.gather(*self.tasks)

    async def ask(self, index):
        while not self.is_over:
            await self.api.text(f"{self.name} {index} {self.num_answers} and so on, and on", max_tokens=32)
            self.num_answers += 1

    async def goes_on(self, until):
        """Ten more answers, or the first failure."""
        seen = self.num_answers
        await until(lambda: self.num_answers >= seen + 10 or any(task.done() for task in self.tasks), "traffic goes on")
        for task in self.tasks:
            if task.done():
                task.result()


async def test_etcd_may_be_away(site, reach, unique, until, tmp_path):
    async with AsyncExitStack() as servers:
        first = await servers.enter_async_context(etcd_server(tmp_path / "etcd"))
        site.etcd = first.url
        for name in ("prefill-1", "decode-1"):
            site.start_worker(name)
        gateway = await site.gateway(num_workers=2)
        async with reach(gateway) as api, Traffic(api, unique) as traffic:
            await traffic.goes_on(until)
            await servers.aclose()
            await gateway.process.says("event=etcd.unavailable")
            await traffic.goes_on(until)
            assert set(await api.fleet()) == {"prefill-1", "decode-1"}
            late = site.start_worker("decode-2")  # waits for etcd
            await late.says("event=etcd.unavailable")
            await traffic.goes_on(until)
            await servers.enter_async_context(etcd_server(tmp_path / "etcd", first.port))
            await late.says("event=worker.ready")

            async def has_joined():
                fleet = await api.fleet()
                return len(fleet) == 3 and all(worker["is_connected"] for worker in fleet.values())

            await until(has_joined)
            await traffic.goes_on(until)
        assert all(process.is_running for process in site.processes)
        site.close()


async def test_etcd_may_lose_everything(site, reach, unique, until, tmp_path):
    async with AsyncExitStack() as servers:
        first = await servers.enter_async_context(etcd_server(tmp_path / "etcd"))
        site.etcd = first.url
        site.start_worker("both-1")
        gateway = await site.gateway(num_workers=1)
        async with reach(gateway) as api, Traffic(api, unique) as traffic:
            await traffic.goes_on(until)
            await servers.aclose()
            await servers.enter_async_context(etcd_server(tmp_path / "empty", first.port))
            await site.worker("both-2")

            async def are_both_there():
                fleet = await api.fleet()
                return len(fleet) == 2 and all(worker["is_connected"] for worker in fleet.values())

            await until(are_both_there)
            await traffic.goes_on(until)
        site.close()


async def test_nats_may_be_away(site, reach, unique, until, tmp_path):
    async with AsyncExitStack() as servers:
        first = await servers.enter_async_context(nats_server(tmp_path / "nats"))
        site.nats = first.url
        for name in ("decode-1", "decode-2"):
            site.start_worker(name)
        serving, watching = site.start_gateway(), site.start_gateway()
        await site.ready(serving, 2)
        await site.ready(watching, 2)
        async with reach(serving) as api, reach(watching) as other, Traffic(api, unique) as traffic:
            await traffic.goes_on(until)
            await servers.aclose()
            await traffic.goes_on(until)
            prompt = f"computed while nobody could hear of it: {unique}"
            response = await api.chat(prompt)
            worker = response.headers["x-headrace-decode"]
            assert (await other.cached_tokens(prompt))[worker] == 0
            await servers.enter_async_context(nats_server(tmp_path / "nats", first.port))
            await traffic.goes_on(until)
            num_tokens = response.json()["usage"]["prompt_tokens"]

            async def has_learned():
                return (await other.cached_tokens(prompt))[worker] >= (num_tokens - 1) // 16 * 16

            await until(has_learned)
            assert all(process.is_running for process in site.processes)
        site.close()


async def test_a_gateway_may_start_while_etcd_and_nats_are_away(site, reach, unique, until, tmp_path):
    async with AsyncExitStack() as servers:
        etcd = await servers.enter_async_context(etcd_server(tmp_path / "etcd"))
        nats = await servers.enter_async_context(nats_server(tmp_path / "nats"))
        site.etcd, site.nats = etcd.url, nats.url
        await servers.aclose()
        site.start_worker("both-1")
        gateway = await site.gateway(num_workers=0)
        async with reach(gateway) as api:
            response = await api.chat(unique)
            assert response.status_code in {404, 503}, response.text
            await servers.enter_async_context(etcd_server(tmp_path / "etcd", etcd.port))
            await servers.enter_async_context(nats_server(tmp_path / "nats", nats.port))
            await site.ready(gateway, 1)
            assert (await api.chat(unique)).status_code == 200
        site.close()
