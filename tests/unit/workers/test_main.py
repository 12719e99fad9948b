import asyncio

import pytest

from workers.engine.base import EngineStartError
from workers.main import Ending, serve
from workers.settings import WorkerSettings


async def forever():
    await asyncio.Event().wait()


async def nothing():
    return None


async def trouble():
    raise ValueError("trouble")


async def test_work_that_ends_before_the_end_is_done():
    assert await Ending().run_until_ending(nothing())


async def test_the_end_cancels_the_work_it_interrupts():
    ending = Ending()
    ending.asked()
    assert not await ending.run_until_ending(forever())


async def test_what_the_work_raises_is_passed_on():
    with pytest.raises(ValueError, match="trouble"):
        await Ending().run_until_ending(trouble())


async def test_the_first_reason_for_the_end_counts():
    asked, died = Ending(), Ending()
    asked.asked()
    asked.engine_died("later")
    died.engine_died("first")
    died.asked()
    assert (asked.death, died.death) == (None, "first")
    await asked.wait()


class HalfStarted:
    """An engine that had begun to start when it found out that it cannot."""

    def __init__(self, *_, **__):
        self.said = []

    def load(self):
        raise AssertionError("it never ran")

    async def start(self, observer, *, progress):
        self.said.append("start")
        raise EngineStartError("no memory for the KV cache")

    async def stop(self):
        self.said.append("stop")


async def test_an_engine_that_cannot_start_is_stopped():
    engine = HalfStarted()
    nowhere = {"etcd": "http://127.0.0.1:9", "nats": "nats://127.0.0.1:9"}
    settings = WorkerSettings(engine="sim", **nowhere)
    with pytest.raises(EngineStartError, match="no memory"):
        await serve(settings, Ending(), make_engine=lambda *_, **__: engine)
    assert engine.said == ["start", "stop"]
