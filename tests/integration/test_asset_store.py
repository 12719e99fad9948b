"""JetStream that is small, borrowed, emptied or not there: model cards arrive all the same, or it is said why."""

import asyncio

import pytest

from planes.bucket import NoJetStream, StoreUnusable
from planes.objects import ObjectStore
from tests.nats_servers import call, client_of, own_nats, plane_to

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.mark.parametrize("limit", [2048, 64 * 1024])
async def test_pieces_fit_what_the_server_takes(tmp_path, limit):
    data = bytes(range(256)) * 1000
    async with own_nats(tmp_path / "nats", f"JS\nmax_payload: {limit}\n") as url, plane_to(url) as plane:
        await ObjectStore(plane).put("x", data)
        assert await ObjectStore(plane).get("x") == data


async def test_a_stream_that_was_set_up_otherwise_is_used_as_it_is(tmp_path):
    own = {"name": "OBJ_headrace-ns", "subjects": ["$O.headrace-ns.>"], "storage": "memory", "max_bytes": 1 << 20}
    async with own_nats(tmp_path / "nats", "JS\n") as url, client_of(url) as client, plane_to(url) as plane:
        before = await call(client, f"STREAM.CREATE.{own['name']}", own)
        store = ObjectStore(plane)
        await store.put("x", b"abc" * 100_000)
        assert await store.get("x") == b"abc" * 100_000
        assert not await store.has("y")
        after = await call(client, f"STREAM.INFO.{own['name']}")
        assert after["config"] == before["config"]


async def test_a_stream_that_cannot_hold_the_store_is_named(tmp_path):
    own = {"name": "OBJ_headrace-ns", "subjects": ["elsewhere"], "storage": "memory"}
    async with own_nats(tmp_path / "nats", "JS\n") as url, client_of(url) as client, plane_to(url) as plane:
        await call(client, f"STREAM.CREATE.{own['name']}", own)
        with pytest.raises(StoreUnusable, match=r"OBJ_headrace-ns takes .*elsewhere.*give it these subjects"):
            await ObjectStore(plane).put("x", b"")


async def test_a_store_that_is_deleted_is_made_anew(tmp_path):
    async with own_nats(tmp_path / "nats", "JS\n") as url, client_of(url) as client, plane_to(url) as plane:
        store = ObjectStore(plane)
        await store.put("x", b"1")
        await call(client, "STREAM.DELETE.OBJ_headrace-ns")
        assert not await store.has("x")
        await store.put("x", b"1")
        assert await store.get("x") == b"1"


async def test_without_jetstream_the_worker_waits_and_says_so_once(site, tmp_path):
    async with own_nats(tmp_path / "nats", "") as url:
        async with plane_to(url) as plane:
            with pytest.raises(NoJetStream, match=r"without JetStream.*nats-server with -js"):
                await ObjectStore(plane).has("x")
        site.nats = url
        worker = site.start_worker("both-1")
        await worker.says("nats-server with -js")
        gateway = await site.gateway(num_workers=0)
        await asyncio.sleep(12)  # longer than a worker waits for a card while NATS is away
        assert worker.log.read_text().count("event=card.not_published") == 1
        assert worker.said("event=worker.ready") is None
        assert gateway.process.is_running
        site.close()


async def test_an_emptied_store_is_filled_again_for_gateways_to_come(site, reach, unique, tmp_path):
    async with own_nats(tmp_path / "nats", "JS\nmax_payload: 65536\n") as url, client_of(url) as client:
        site.nats = url
        await site.worker("both-1")
        await call(client, f"STREAM.DELETE.OBJ_headrace-{site.namespace}")
        gateway = await site.gateway(num_workers=1)
        async with reach(gateway) as api:
            assert (await api.chat(unique)).status_code == 200
        site.close()
