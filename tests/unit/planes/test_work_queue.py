"""Prefill jobs without NATS: what a delivered message says about its job."""

import pytest

from planes.events import EventPlane, Reply
from planes.work_queue import PrefillQueue, PrefillQueueFull, ServerClock

SUBJECTS = {
    "old form": "$JS.ACK.headrace-ns-prefill.m.2.11.12.1500000000000.0",
    "with domain": "$JS.ACK.hub.ACC.headrace-ns-prefill.m.2.11.12.1500000000000.0.x7",
}


@pytest.fixture
def queue() -> PrefillQueue:
    queue = PrefillQueue(EventPlane("nats://127.0.0.1:1", "ns"), clock=lambda: 77.0)
    queue._clock.read("1970-01-01T00:25:10.000000000Z", 77.0)  # 1510 s
    return queue


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_a_job_knows_its_deliveries_and_its_age(queue: PrefillQueue, subject: str) -> None:
    job = queue._job(Reply(b"payload", {"Nats-Msg-Id": "r1"}, subject))
    assert (job.payload, job.job_id, job.num_deliveries, job.age_s) == (b"payload", "r1", 2, 10.0)


async def test_a_job_larger_than_a_message_is_rejected_with_its_size(queue: PrefillQueue) -> None:
    with pytest.raises(PrefillQueueFull, match="2000000 bytes; NATS takes messages of 1048576 bytes"):
        await queue.submit("m", bytes(2_000_000), "r1")


def test_ages_are_by_nats_clock_whatever_ours_says() -> None:
    now = 5.0
    clock = ServerClock(lambda: now)
    assert clock.is_due
    clock.read("2026-11-28T01:00:10.5Z", clock.asked())
    stored_at = 1795827608.5  # 2 s before, there
    assert clock.age_s(stored_at) == pytest.approx(2.0)
    assert clock.age_s(stored_at + 60.0) == 0.0  # stored by a server whose clock is ahead
    now = 15.0
    assert clock.age_s(stored_at) == pytest.approx(12.0)
    assert not clock.is_due


def test_the_clock_is_read_again_in_time_and_at_once_if_the_answer_took_long() -> None:
    now = 100.0
    clock = ServerClock(lambda: now)
    clock.read("2026-11-28T01:00:10Z", asked_at=94.0)  # this process was frozen
    assert clock.is_due
    clock.read("2026-11-28T01:00:10Z", asked_at=99.9)
    assert not clock.is_due
    now = 161.0
    assert clock.is_due
