"""JetStream that is small, borrowed, emptied or not there: model cards arrive all the same, or it is said why."""

import asyncio
import contextlib
import json
import socket
import subprocess
from contextlib import asynccontextmanager

import pytest
from nats.aio.client import Client

from app.cli.servers import nats_argv, tied_to_parent
from planes.events import EventPlane
from planes.objects import NoJetStream, ObjectStore, StoreUnusable

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@asynccontextmanager
async def own_nats(folder, config):
    """A server with this configuration; `JS` stands for its JetStream."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    (folder / "nats.conf").write_text(config.replace("JS", f'jetstream {{ store_dir: "{folder}/js" }}'))
    server = nats_argv(folder, port)[0]
    argv = tied_to_parent([server, "-c", str(folder / "nats.conf"), "-a", "127.0.0.1", "-p", str(port)])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)  # noqa: ASYNC220 - it forks, and is there
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@asynccontextmanager
async def plane_to(url):
    plane = EventPlane(url, "ns")
    task = asyncio.create_task(plane.run())
    try:
        await plane.wait_connected(10)
        yield plane
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def client_of(url):
    client = Client()
    await client.connect(url)
    try:
        yield client
    finally:
        await client.close()


async def call(client, api, body=None):
    reply = await client.request(f"$JS.API.{api}", json.dumps(body).encode() if body else b"", timeout=5)
    answer = json.loads(reply.data)
    assert "error" not in answer, answer
    return answer


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
        with contextlib.suppress(Exception):  # the first one to find out
            await store.has("x")
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
