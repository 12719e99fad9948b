"""Model cards and large files through a real object store."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.client import Client

from planes.assets import fetch_card, make_card, publish_card
from planes.bucket import ObjectMissing
from planes.events import EventPlane
from planes.objects import ObjectStore, StoreFull

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@asynccontextmanager
async def store(url: str, namespace: str) -> AsyncIterator[ObjectStore]:
    plane = EventPlane(url, namespace)
    task = asyncio.create_task(plane.run())
    try:
        await plane.wait_connected(60)
        yield ObjectStore(plane)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_card_with_a_tokenizer_of_33_mb(nats_url: str, namespace: str, tmp_path: Path) -> None:
    files = {"tokenizer.json": os.urandom(33 * 1024 * 1024), "generation_config.json": b'{"eos_token_id": 1}'}
    card = make_card(files, model="m", block_size=16)
    async with store(nats_url, namespace) as worker, store(nats_url, namespace) as gateway:
        digest = await publish_card(worker, card, files)
        loaded = await fetch_card(gateway, digest, tmp_path)
    assert loaded.card == card
    assert loaded.files == files


async def test_many_workers_may_publish_at_once(nats_url: str, namespace: str, tmp_path: Path) -> None:
    files = {"tokenizer.json": os.urandom(1024 * 1024)}
    card = make_card(files, model="m", block_size=16)
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(store(nats_url, namespace)) for _ in range(4)]
        digests = await asyncio.gather(*(publish_card(worker, card, files) for worker in workers))
        assert len(set(digests)) == 1
        assert (await fetch_card(workers[0], digests[0], tmp_path)).files == files
        state = (await workers[0]._bucket.plane.jetstream(f"STREAM.INFO.{workers[0]._bucket.stream}"))["state"]
    assert state["messages"] == 8 + 1 + 1 + 1  # chunks of the file, of the card, and their two records


async def test_an_unknown_object_is_missing(nats_url: str, namespace: str) -> None:
    async with store(nats_url, namespace) as gateway:
        assert not await gateway.has("x")
        with pytest.raises(ObjectMissing):
            await gateway.get("x")


async def test_an_empty_object_is_an_object(nats_url: str, namespace: str) -> None:
    async with store(nats_url, namespace) as worker:
        await worker.put("x", b"")
        assert await worker.get("x") == b""


async def test_a_store_has_a_limit_and_takes_no_more_of_the_disk_than_it_holds(nats_url: str, namespace: str) -> None:
    async with store(nats_url, namespace) as worker:
        small = ObjectStore(worker._bucket.plane, max_bytes=10_000)
        await small.put("x", bytes(6_000))
        with pytest.raises(StoreFull, match="10000"):
            await small.put("y", bytes(6_000))
        await small.put("x", bytes(6_000))
        assert (await worker._bucket.plane.jetstream("INFO"))["reserved_storage"] == 0


async def test_other_clients_of_the_object_store_can_read_ours(nats_url: str, namespace: str) -> None:
    data = os.urandom(300_000)
    async with store(nats_url, namespace) as worker:
        await worker.put("x", data)
    client = Client()
    await client.connect(nats_url)
    try:
        bucket = await client.jetstream().object_store(f"headrace-{namespace}")
        assert (await bucket.get("x")).data == data
    finally:
        await client.close()
