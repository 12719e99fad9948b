import asyncio

import pytest

from planes.wire.messages import RequestId
from workers.vllm.leases import Leases

A, B = RequestId("a"), RequestId("b")


class Engine:
    """Is asked to abort, and answers or never does."""

    def __init__(self, *, is_answering=True):
        self.aborted, self.num_waiting = [], 0
        self.is_answering = is_answering

    async def abort(self, names):
        self.aborted += names
        self.num_waiting += 1
        try:
            if not self.is_answering:
                await asyncio.Event().wait()
        finally:
            self.num_waiting -= 1


class Clock:
    def __init__(self):
        self.timers = []

    def later(self, delay, callback, *args):
        self.timers.append((delay, lambda: callback(*args)))


@pytest.fixture
def clock():
    return Clock()


async def until_idle():
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_released_kv_cache_is_aborted_once_by_the_engine_s_own_name(clock):
    engine = Engine()
    leases = Leases(30, engine.abort, call_later=clock.later)
    leases.keep(A, "a-0123")
    leases.keep(B, "b-4567")
    leases.release(A)
    leases.release(A)
    await until_idle()
    assert engine.aborted == ["a-0123"]


async def test_an_abort_that_is_never_answered_leaves_nothing_registered(clock):
    engine = Engine(is_answering=False)
    leases = Leases(30, engine.abort, call_later=clock.later)
    leases.keep(A, "a-0123")
    leases.release(A)
    await until_idle()
    leases.release(A)  # there is nothing left to release
    leases.keep(A, "a-89ab")  # the next attempt is another request of the engine's
    leases.release(A)
    await until_idle()
    assert engine.aborted == ["a-0123", "a-89ab"]
    await leases.stop()
    assert engine.num_waiting == 0


async def test_a_lease_that_is_over_is_nothing_to_release_and_ends_no_later_one(clock):
    engine = Engine()
    leases = Leases(30, engine.abort, call_later=clock.later)
    leases.keep(A, "a-0123")
    leases.release(A)
    leases.keep(A, "a-4567")
    (delay, first), (_, second) = clock.timers
    assert delay == 30
    first()
    leases.release(A)
    leases.keep(A, "a-89ab")
    second()
    clock.timers[-1][1]()
    leases.release(A)
    await until_idle()
    assert engine.aborted == ["a-0123", "a-4567"]
