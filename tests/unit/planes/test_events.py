"""The event plane without NATS: addresses, parts of snapshots, what is dropped and what is counted."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from planes import events
from planes.events import EventPlane, EventPlaneUnavailable, Reply
from planes.wire.messages import BlocksStored, KvEvents, Snapshot, WorkerId
from tests.fakes import DEEP_PACKED

WORKER = WorkerId("w")


class FakeInbox:
    def __init__(self, replies: list[Reply]) -> None:
        self._replies = iter(replies)

    async def next(self, timeout_s: float) -> Reply:
        return next(self._replies)


def reply(part: events._Part) -> Reply:
    return Reply(msgspec.msgpack.encode(part), {}, "")


def test_subjects_hold_any_worker_name() -> None:
    plane = EventPlane("nats://127.0.0.1:1", "ns")
    assert plane.subject("kv", "10.0.0.1:5000") == "headrace.ns.kv.10%2E0%2E0%2E1%3A5000"
    assert plane.subjects("kv") == "headrace.ns.kv.*"


@pytest.mark.parametrize("parts", [0, 1, 2])
@pytest.mark.parametrize("more", [0, 8])
async def test_a_snapshot_is_the_same_after_its_parts(parts: int, more: int) -> None:
    hashes = (bytes(range(251)) * 5000)[: parts * events._PART_BYTES + more]
    snapshot = Snapshot(worker=WORKER, epoch=7, seq=9, hashes=hashes)
    sent = list(events._split(snapshot))
    assert max(len(part.hashes) for part in sent) <= events._PART_BYTES
    assert await events._join(WORKER, FakeInbox([reply(part) for part in sent]), 1.0) == snapshot


async def test_a_lost_part_is_noticed() -> None:
    sent = list(events._split(Snapshot(worker=WORKER, epoch=7, seq=9, hashes=bytes(3 * events._PART_BYTES))))
    with pytest.raises(EventPlaneUnavailable, match="goes on at byte"):
        await events._join(WORKER, FakeInbox([reply(sent[0]), reply(sent[2])]), 1.0)


async def test_parts_of_two_snapshots_are_not_mixed() -> None:
    old = list(events._split(Snapshot(worker=WORKER, epoch=7, seq=9, hashes=bytes(2 * events._PART_BYTES))))
    new = list(events._split(Snapshot(worker=WORKER, epoch=7, seq=10, hashes=bytes(2 * events._PART_BYTES))))
    with pytest.raises(EventPlaneUnavailable, match="another snapshot"):
        await events._join(WORKER, FakeInbox([reply(old[0]), reply(new[1])]), 1.0)


async def test_a_malformed_part_is_an_error() -> None:
    with pytest.raises(EventPlaneUnavailable, match="malformed"):
        await events._join(WORKER, FakeInbox([Reply(b"x", {}, "")]), 1.0)


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancellation_that_comes_with_an_answer_is_not_lost(turns: int) -> None:
    """As where a process was frozen, and finds a signal and a message at once."""
    subscription = Subscription(SimpleNamespace(is_closed=False))
    waiting = asyncio.create_task(events.Inbox("s", subscription).next(60.0))
    for _ in range(5):
        await asyncio.sleep(0)
    subscription._pending_queue.put_nowait(Msg(_client=None))
    for _ in range(turns):
        await asyncio.sleep(0)
    is_late = waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled() or is_late


async def test_publishing_without_a_connection_drops_and_counts() -> None:
    plane = EventPlane("nats://127.0.0.1:1", "ns")
    for _ in range(3):
        await plane.publish_kv(KvEvents(WORKER, 1, 1, [BlocksStored(b"")]))
    assert (plane.counters.dropped, plane.counters.published) == (3, 0)


async def test_requests_without_a_connection_fail_at_once() -> None:
    plane = EventPlane("nats://127.0.0.1:1", "ns")
    with pytest.raises(EventPlaneUnavailable, match=r"no connection to NATS at nats://127\.0\.0\.1:1"):
        await plane.request_snapshot(WORKER)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", DEEP_PACKED, msgspec.msgpack.encode({"worker": 1})])
async def test_a_malformed_message_is_counted_and_dropped(data: bytes) -> None:
    plane = EventPlane("nats://127.0.0.1:1", "ns")
    seen: list[KvEvents] = []
    handle = plane._decoded(KvEvents, seen.append)
    await handle(Msg(_client=None, data=data))
    good = KvEvents(WORKER, 1, 1, [BlocksStored(b"12345678")])
    await handle(Msg(_client=None, data=msgspec.msgpack.encode(good)))
    assert seen == [good]
    assert plane.counters.malformed == 1
