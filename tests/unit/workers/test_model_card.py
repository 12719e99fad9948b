import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from planes.assets import AssetsUnavailable, fetch_card
from planes.events import EventPlaneUnavailable
from workers.model_card import CardPublisher, read_card
from workers.settings import SIM_MODEL


class FakeStore:
    def __init__(self, failures=0):
        self.objects, self.failures = {}, failures
        self.was_away, self.was_filled = asyncio.Event(), asyncio.Event()

    async def has(self, name):
        return name in self.objects

    async def put(self, name, data):
        if self.failures:
            self.failures -= 1
            self.was_away.set()
            raise EventPlaneUnavailable("away")
        self.objects[name] = data
        if len(self.objects) == 4:  # three files and the card
            self.was_filled.set()

    async def get(self, name):
        return self.objects[name]


class FakePlane:
    def __init__(self):
        self.connect = None

    def on_connect(self, callback):
        self.connect = callback


async def sim_card():
    return await read_card(SIM_MODEL, model="sim", block_size=16)


@asynccontextmanager
async def running(publisher):
    task = asyncio.create_task(publisher.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_card_is_stored_with_its_files_under_the_digest_known_before(tmp_path):
    store, plane = FakeStore(), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane)
    plane.connect()
    async with running(publisher):
        await publisher.published.wait()
    loaded = await fetch_card(store, publisher.digest, tmp_path)
    assert (loaded.card.model, loaded.card.block_size) == ("sim", 16)
    assert 259 in loaded.card.eos_token_ids
    assert loaded.files["tokenizer.json"] == (SIM_MODEL / "tokenizer.json").read_bytes()


async def test_a_store_that_failed_is_tried_again_with_the_next_connection():
    store, plane = FakeStore(failures=1), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane)
    plane.connect()
    async with running(publisher):
        await store.was_away.wait()
        assert not publisher.published.is_set()
        plane.connect()
        await publisher.published.wait()
    assert publisher.digest in store.objects


async def test_a_store_that_lost_everything_is_filled_again():
    store, plane = FakeStore(), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane)
    plane.connect()
    async with running(publisher):
        await publisher.published.wait()
        store.objects.clear()
        store.was_filled.clear()
        plane.connect()
        await store.was_filled.wait()


async def test_a_directory_without_a_tokenizer_makes_no_card(tmp_path: Path):
    with pytest.raises(AssetsUnavailable, match=r"tokenizer\.json"):
        await read_card(tmp_path, model="m", block_size=16)


async def test_a_store_that_is_emptied_while_everybody_stays_connected_is_filled_again():
    store, plane = FakeStore(), FakePlane()
    publisher = CardPublisher(SIM_MODEL, await sim_card(), store, plane, look_s=0.001)
    plane.connect()
    async with running(publisher):
        await store.was_filled.wait()
        store.was_filled.clear()
        store.objects.clear()
        await store.was_filled.wait()
    assert publisher.digest in store.objects
