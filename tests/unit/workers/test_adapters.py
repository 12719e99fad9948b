import asyncio

import msgspec
import pytest

from planes.wire.messages import Adapter
from tests.fakes import DEEP
from workers.adapters import AdapterKeeper
from workers.engine.base import AdapterUnusable

POET = Adapter("poet", "m", "/a/poet", 7)


class Engine:
    def __init__(self):
        self.loaded, self.refuses, self.refuses_number = [], set(), None
        self.may_unload = asyncio.Event()
        self.may_unload.set()

    async def load_adapter(self, adapter):
        if adapter.name in self.refuses or adapter.number == self.refuses_number:
            raise AdapterUnusable("no such directory")
        self.loaded.append(adapter.number)

    async def unload_adapter(self, adapter):
        await self.may_unload.wait()
        self.loaded.remove(adapter.number)


class Server:
    def __init__(self):
        self.adapters = set()
        self.has_none = asyncio.Event()
        self.has_none.set()
        self.waits = asyncio.Queue()

    async def until_without(self, number):
        self.waits.put_nowait(number)
        await self.has_none.wait()


class Registered:
    def __init__(self):
        self.adapters, self.news = {}, asyncio.Event()

    def __call__(self, adapters):
        self.adapters = adapters
        self.news.set()

    async def until(self, adapters):
        async with asyncio.timeout(60):
            while self.adapters != adapters:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
async def kept():
    """A keeper that lets nothing linger, and what it works with."""
    engine, server, registered = Engine(), Server(), Registered()
    keeper = AdapterKeeper("m", engine, server, registered, linger_s=0.0)
    running = asyncio.create_task(keeper.run())
    yield keeper, engine, server, registered
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def packed(adapter):
    return msgspec.json.encode(adapter)


async def test_an_adapter_is_taken_and_registered_once_it_is_loaded(kept):
    keeper, engine, server, registered = kept
    keeper.take("poet", packed(POET))
    await registered.until({7: ""})
    assert (engine.loaded, server.adapters) == ([7], {7})


async def test_those_of_other_models_and_unreadable_ones_are_none_of_its(kept):
    keeper, engine, _, registered = kept
    keeper.take("other", packed(Adapter("other", "n", "/a", 3)))
    keeper.take("broken", b"{")
    keeper.take("deep", DEEP)
    keeper.take("poet", packed(POET))
    await registered.until({7: ""})
    assert engine.loaded == [7]


async def test_why_one_is_not_loaded_is_registered_until_it_is_gone(kept):
    keeper, engine, server, registered = kept
    engine.refuses.add("poet")
    keeper.take("poet", packed(POET))
    await registered.until({7: "no such directory"})
    assert server.adapters == set()
    keeper.take("poet", None)
    await registered.until({})


async def test_one_that_is_gone_stays_for_the_requests_that_run_with_it(kept):
    keeper, engine, server, registered = kept
    keeper.take("poet", packed(POET))
    await registered.until({7: ""})
    server.has_none.clear()
    keeper.take("poet", None)
    keeper.take("prose", packed(Adapter("prose", "m", "/a/prose", 8)))
    await registered.until({7: "", 8: ""})
    assert server.adapters == {7, 8}
    server.has_none.set()
    await registered.until({8: ""})
    assert (engine.loaded, server.adapters) == ([8], {8})


async def test_one_that_comes_back_before_it_was_given_up_stays(kept):
    keeper, engine, server, registered = kept
    engine.refuses_number = 9
    keeper.take("poet", packed(POET))
    await registered.until({7: ""})
    server.has_none.clear()
    keeper.take("poet", packed(msgspec.structs.replace(POET, number=9)))
    await registered.until({7: "", 9: "no such directory"})
    assert await server.waits.get() == 7
    keeper.take("poet", packed(POET))
    await registered.until({7: ""})
    assert (engine.loaded, server.adapters) == ([7], {7})
    keeper.take("poet", None)
    assert await server.waits.get() == 7, "it is given as long as the first time"
    server.has_none.set()
    await registered.until({})
    assert engine.loaded == []


async def test_one_that_comes_back_while_it_is_unloaded_is_loaded_again(kept):
    keeper, engine, _, registered = kept
    keeper.take("poet", packed(POET))
    await registered.until({7: ""})
    engine.may_unload.clear()
    keeper.take("poet", None)
    await registered.until({})
    keeper.take("poet", packed(POET))
    engine.may_unload.set()
    await registered.until({7: ""})
    assert engine.loaded == [7]


async def test_another_load_of_a_name_is_another_adapter(kept):
    keeper, engine, _, registered = kept
    keeper.take("poet", packed(POET))
    await registered.until({7: ""})
    keeper.take("poet", packed(msgspec.structs.replace(POET, number=9)))
    await registered.until({9: ""})
    assert engine.loaded == [9]
