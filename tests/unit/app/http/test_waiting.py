import asyncio
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from app.http.waiting import LateEvent, ShortQueue


async def test_who_waits_goes_on_when_it_is_set():
    event = LateEvent()
    waiting = [asyncio.create_task(event.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    event.set()
    assert await asyncio.gather(*waiting) == [True, True]
    assert event.is_set()
    assert await event.wait()


async def test_once_cleared_it_is_waited_for_again():
    event = LateEvent(is_set=True)
    assert await event.wait()
    event.clear()
    assert not event.is_set()
    waiting = asyncio.create_task(event.wait())
    await asyncio.sleep(0)
    event.set()
    event.clear()
    assert await waiting, "it was set while somebody waited"
    again = asyncio.create_task(event.wait())
    await asyncio.sleep(0)
    assert not again.done()
    event.set()
    assert await again


@given(st.lists(st.sampled_from(["append", "appendleft", "pop", "popleft"]), max_size=30))
def test_a_short_queue_is_a_deque(calls):
    ours, theirs = ShortQueue(), deque()
    for number, call in enumerate(calls):
        if call.startswith("append"):
            getattr(ours, call)(number)
            getattr(theirs, call)(number)
        elif theirs:
            assert getattr(ours, call)() == getattr(theirs, call)()
    assert list(ours) == list(theirs)
