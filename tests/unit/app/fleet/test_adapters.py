import asyncio

import msgspec
import pytest

from app.fleet.adapters import AdapterRefused, Adapters, AdaptersUnavailable
from app.openai.errors import ModelNotFound
from planes.wire.messages import Adapter
from tests.fakes import FakeEntries


class Workers:
    """answers: by worker, what it says of any adapter."""

    def __init__(self, **answers):
        self.said, self.news = answers, asyncio.Event()

    def answers(self, adapter):
        return dict(self.said) if adapter.parent == "m" else {}

    def changed(self):
        return self.news.wait()

    def say(self, **answers):
        self.said |= answers
        self.news.set()
        self.news = asyncio.Event()


@pytest.fixture
def fleet():
    """The adapters of a fleet, which follow at once what stands in etcd.  Returns: what makes them."""

    def make(workers, *, patience_s=60.0):
        entries, numbers = FakeEntries(), iter(range(1, 100))
        adapters = Adapters(
            entries, {}, workers, new_number=lambda: next(numbers), wall_clock=lambda: 5.0, patience_s=patience_s
        )
        swap = entries.swap

        async def told(name, value, *, revision):
            is_done = await swap(name, value, revision=revision)
            adapters.take(name, value)
            if value is None:
                del entries.values[name]
            return is_done

        entries.swap = told
        return adapters, entries

    return make


async def test_loading_ends_when_every_worker_has_loaded(fleet):
    workers = Workers(a=None, b=None)
    adapters, entries = fleet(workers)
    loading = asyncio.create_task(adapters.load("poet", "/a", "m", in_place=False))
    await entries.told.wait()
    workers.say(a="")
    for _ in range(20):
        await asyncio.sleep(0)
    assert not loading.done()
    workers.say(b="")
    await loading
    assert adapters.available() == [Adapter("poet", "m", "/a", 1, 5)]


async def test_what_one_worker_cannot_load_is_told_and_leaves_nothing_behind(fleet):
    adapters, entries = fleet(Workers(a="", b="no such directory"))
    with pytest.raises(AdapterRefused, match=r"was not loaded\. b: no such directory"):
        await adapters.load("poet", "/a", "m", in_place=False)
    assert (dict(adapters.known), entries.values) == ({}, {})


async def test_what_cannot_be_loaded_in_place_leaves_what_was_there(fleet):
    workers = Workers(a="")
    adapters, _ = fleet(workers)
    await adapters.load("poet", "/a", "m", in_place=False)
    with pytest.raises(AdapterRefused, match="has already been loaded; unload it first, or set 'load_inplace'"):
        await adapters.load("poet", "/b", "m", in_place=False)
    workers.say(a="broken")
    with pytest.raises(AdapterRefused, match="broken"):
        await adapters.load("poet", "/b", "m", in_place=True)
    assert adapters.known["poet"] == Adapter("poet", "m", "/a", 1, 5)
    workers.say(a="")
    await adapters.load("poet", "/b", "m", in_place=True)
    assert (adapters.known["poet"].path, adapters.known["poet"].number) == ("/b", 4)


async def test_a_worker_that_says_nothing_is_named(fleet):
    adapters, entries = fleet(Workers(a="", b=None), patience_s=0.01)
    with pytest.raises(AdapterRefused, match=r"not loaded within 0\.01 s by b"):
        await adapters.load("poet", "/a", "m", in_place=False)
    assert not entries.values


async def test_without_workers_of_the_model_there_is_nothing_to_load_it(fleet):
    adapters, _ = fleet(Workers(a=""))
    with pytest.raises(ModelNotFound):
        await adapters.load("poet", "/a", "other", in_place=False)
    with pytest.raises(AdapterRefused, match="cannot be"):
        await adapters.load("po\net", "/a", "m", in_place=False)


async def test_unloading_takes_effect_here_at_once(fleet):
    adapters, _ = fleet(Workers(a=""))
    with pytest.raises(ModelNotFound):
        await adapters.unload("poet")
    await adapters.load("poet", "/a", "m", in_place=False)
    await adapters.unload("poet")
    assert (dict(adapters.known), adapters.available()) == ({}, [])


async def test_while_etcd_is_away_nothing_changes(fleet):
    adapters, entries = fleet(Workers(a=""))
    await adapters.load("poet", "/a", "m", in_place=False)
    entries.is_away = True
    for change in (adapters.load("prose", "/b", "m", in_place=False), adapters.unload("poet")):
        with pytest.raises(AdaptersUnavailable):
            await change
    assert list(adapters.known) == ["poet"]


def test_what_cannot_be_read_in_etcd_is_no_adapter(fleet):
    adapters, _ = fleet(Workers(a=""))
    adapters.take("poet", msgspec.json.encode(Adapter("poet", "m", "/a", 1)))
    adapters.take("poet", b'{"name": 5}')
    assert not adapters.known
