import asyncio

import numpy as np
import pytest

from planes.wire.blocks import pack, unpack
from planes.wire.messages import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    KvEvents,
    LoadReport,
    StepSample,
    WorkerId,
    WorkerState,
)
from workers.engine.base import EngineLoad
from workers.kv_events import Publisher

WORKER = WorkerId("decode-1")


class FakeEvents:
    max_message_bytes = 1024 * 1024

    def __init__(self):
        self.sent = []
        self.take = None
        self.arrived = asyncio.Event()

    def on_connect(self, callback):
        callback()  # connected

    async def publish_kv(self, events):
        self.sent.append(events)
        self.arrived.set()

    async def publish_load(self, report):
        self.sent.append(report)
        self.arrived.set()

    async def serve_snapshots(self, worker, take):
        assert worker == WORKER
        self.take = take


def stored(*names):
    return BlocksStored(pack(np.array(names, dtype=np.uint64)))


def removed(*names):
    return BlocksRemoved(pack(np.array(names, dtype=np.uint64)))


def publisher(events=None, load=EngineLoad, on_death=None):
    return Publisher(WORKER, 7, events or FakeEvents(), load=load, on_death=on_death or (lambda reason: None))


async def running(subject, events, until):
    """Run the publisher until `until()` holds."""

    async def wait():
        while not until():
            await events.arrived.wait()
            events.arrived.clear()

    task = asyncio.create_task(subject.run())
    await wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_report_carries_load_steps_and_the_digest_of_what_is_held():
    subject = publisher(load=lambda: EngineLoad(1, 2, 3, 4, 5))
    subject.kv_changed([stored(8, 1)])
    step = StepSample(10, 20, 3, 40, 0.5)
    subject.stepped(step)
    report = subject.report()
    assert (report.worker, report.epoch, report.state) == (WORKER, 7, WorkerState.READY)
    assert (report.num_running, report.num_waiting, report.waiting_prefill_tokens) == (1, 2, 3)
    assert (report.free_blocks, report.kv_tokens) == (4, 5)
    assert (report.seq, report.num_cached, report.digest) == (1, 2, 9)
    assert report.steps == [step]
    assert subject.report().steps == []


def test_a_report_has_the_latest_steps_and_at_most_256():
    subject = publisher()
    for step in range(300):
        subject.stepped(StepSample(step, 0, 0, 0, 0.0))
    assert [sample.prefill_tokens for sample in subject.report().steps] == list(range(44, 300))


def test_a_snapshot_belongs_to_its_sequence_number():
    subject = publisher()
    assert (subject.snapshot().seq, subject.snapshot().hashes) == (0, b"")
    subject.kv_changed([stored(3)])
    snapshot = subject.snapshot()
    assert (snapshot.worker, snapshot.epoch, snapshot.seq) == (WORKER, 7, 1)
    assert unpack(snapshot.hashes).tolist() == [3]


def test_draining_shows_in_reports():
    subject = publisher()
    subject.drain()
    assert subject.report().state is WorkerState.DRAINING


def test_the_death_of_the_engine_is_passed_on():
    reasons = []
    publisher(on_death=reasons.append).died("gone")
    assert reasons == ["gone"]


async def test_the_first_report_comes_with_the_connection():
    events = FakeEvents()
    await running(publisher(events), events, lambda: events.sent)
    assert isinstance(events.sent[0], LoadReport)


async def test_events_of_one_turn_make_one_publication_before_the_report_that_counts_them():
    events = FakeEvents()
    subject = publisher(events)
    subject.kv_changed([stored(1)])
    subject.kv_changed([stored(2), removed(1)])
    await running(subject, events, lambda: any(isinstance(sent, LoadReport) for sent in events.sent))
    batch, report = events.sent
    assert batch == KvEvents(WORKER, 7, 1, [stored(1, 2), removed(1)])
    assert (report.seq, report.num_cached, report.digest) == (1, 1, 2)


async def test_snapshots_are_served_from_the_live_set():
    events = FakeEvents()
    subject = publisher(events)
    await running(subject, events, lambda: events.sent)
    subject.kv_changed([stored(5)])
    assert unpack(events.take().hashes).tolist() == [5]


@pytest.mark.parametrize("kind", [BlocksStored, BlocksRemoved])
async def test_a_large_change_is_split_into_publications_that_fit_a_message(kind):
    events = FakeEvents()
    subject = publisher(events)
    names = np.arange(100_000, dtype=np.uint64)
    subject.kv_changed([kind(pack(names))])
    await running(subject, events, lambda: any(isinstance(sent, LoadReport) for sent in events.sent))
    batches = events.sent[:-1]
    assert [batch.seq for batch in batches] == [1, 2, 3, 4]
    assert max(sum(len(event.hashes) for event in batch.events) for batch in batches) <= 256 * 1024
    assert b"".join(event.hashes for batch in batches for event in batch.events) == pack(names)


async def test_what_cannot_be_sent_in_time_is_dropped_and_leaves_a_gap():
    events = FakeEvents()
    subject = publisher(events)
    for name in range(100):
        subject.kv_changed([stored(name)])
        subject.snapshot()  # numbers what is pending
    await running(subject, events, lambda: len(events.sent) >= 64)
    batches = [sent for sent in events.sent if isinstance(sent, KvEvents)]
    assert batches[0].seq > 1
    assert batches[-1].seq == 100
    assert subject.report().num_cached == 100


async def test_neighbours_of_one_kind_travel_as_one_event():
    events = FakeEvents()
    subject = publisher(events)
    subject.kv_changed([stored(1), stored(2, 3), removed(1), AllCleared(), AllCleared(), stored(4)])
    subject.kv_changed([stored(5)])
    await running(subject, events, lambda: events.sent)
    assert events.sent[0].events == [stored(1, 2, 3), removed(1), AllCleared(), stored(4, 5)]
