"""Prefill jobs without NATS: what a delivered message says about its job."""

import pytest

from planes.events import EventPlane, Reply
from planes.work_queue import PrefillQueue, PrefillQueueFull

SUBJECTS = {
    "old form": "$JS.ACK.headrace-ns-prefill.m.2.11.12.1500000000000.0",
    "with domain": "$JS.ACK.hub.ACC.headrace-ns-prefill.m.2.11.12.1500000000000.0.x7",
}


@pytest.fixture
def queue() -> PrefillQueue:
    return PrefillQueue(EventPlane("nats://127.0.0.1:1", "ns"), wall_clock=lambda: 1510.0)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_a_job_knows_its_deliveries_and_its_age(queue: PrefillQueue, subject: str) -> None:
    job = queue._job(Reply(b"payload", {"Nats-Msg-Id": "r1"}, subject))
    assert (job.payload, job.job_id, job.num_deliveries, job.age_s) == (b"payload", "r1", 2, 10.0)


async def test_a_job_larger_than_a_message_is_rejected_with_its_size(queue: PrefillQueue) -> None:
    with pytest.raises(PrefillQueueFull, match="2000000 bytes; NATS takes messages of 1048576 bytes"):
        await queue.submit("m", bytes(2_000_000), "r1")
