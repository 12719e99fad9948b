"""The event plane against a real NATS, and against one that goes away."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.cli.servers import nats_server
from planes.events import EventPlaneUnavailable
from planes.wire.blocks import unpack
from planes.wire.messages import BlocksStored, KvEvents, LoadReport, Snapshot, WorkerId, WorkerState
from planes.work_queue import JobLimits, PrefillQueue, PrefillQueueFull
from tests.nats_servers import own_nats
from tests.nats_servers import plane_to as plane
from workers.engine.base import EngineLoad
from workers.kv_events import Publisher
from workers.publications import CachedBlocks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

WORKER = WorkerId("10.0.0.1:5000")
MODEL = "google/gemma-3.1 270m"


def batch(seq: int) -> KvEvents:
    return KvEvents(WORKER, 1, seq, [BlocksStored(seq.to_bytes(8, "little"))])


def report(seq: int) -> LoadReport:
    return LoadReport(
        worker=WORKER,
        epoch=1,
        state=WorkerState.READY,
        num_running=0,
        num_waiting=0,
        waiting_prefill_tokens=0,
        free_blocks=0,
        kv_tokens=0,
        seq=seq,
        num_cached=0,
        digest=2**64 - 1,
    )


class Seen:
    """What was received, and a way to wait for more."""

    def __init__(self) -> None:
        self.messages: list[KvEvents | LoadReport] = []
        self._news = asyncio.Event()

    def __call__(self, message: KvEvents | LoadReport) -> None:
        self.messages.append(message)
        self._news.set()

    async def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._news.clear()
            await self._news.wait()


async def test_events_and_reports_arrive_in_order(nats_url: str, namespace: str) -> None:
    seen = Seen()
    async with plane(nats_url, namespace) as gateway, plane(nats_url, namespace) as worker:
        await gateway.subscribe_kv(seen)
        await gateway.flush()
        for seq in range(1, 2001):
            await worker.publish_kv(batch(seq))
            if seq % 100 == 0:
                await worker.flush()
        await seen.until(lambda: len(seen.messages) == 2000)
        assert seen.messages == [batch(seq) for seq in range(1, 2001)]
        assert worker.counters.dropped == 0
        await gateway.subscribe_load(seen)
        await gateway.flush()
        await worker.publish_load(report(5))
        await seen.until(lambda: seen.messages[-1] == report(5))


async def test_namespaces_do_not_hear_each_other(nats_url: str, namespace: str) -> None:
    seen = Seen()
    async with plane(nats_url, namespace) as here, plane(nats_url, f"{namespace}-other") as there:
        await here.subscribe_kv(seen)
        await here.flush()
        await there.publish_kv(batch(1))
        await there.flush()
        await here.publish_kv(batch(2))
        await seen.until(lambda: bool(seen.messages))
    assert seen.messages == [batch(2)]


async def test_a_snapshot_of_a_million_blocks(nats_url: str, namespace: str) -> None:
    hashes = np.arange(1_000_000, dtype="<u8").tobytes()
    snapshot = Snapshot(worker=WORKER, epoch=3, seq=4, hashes=hashes)
    async with plane(nats_url, namespace) as gateway, plane(nats_url, namespace) as worker:
        await worker.serve_snapshots(WORKER, lambda: snapshot)
        await worker.flush()
        assert await gateway.request_snapshot(WORKER) == snapshot
        both = await asyncio.gather(gateway.request_snapshot(WORKER), gateway.request_snapshot(WORKER))
        assert both == [snapshot, snapshot]


async def test_a_snapshot_that_nobody_serves_fails_at_once(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway:
        with pytest.raises(EventPlaneUnavailable, match="nobody serves"):
            await gateway.request_snapshot(WorkerId("gone"), timeout_s=50)


async def test_nats_restarts_and_events_flow_again(tmp_path: Path, namespace: str) -> None:
    seen, connected = Seen(), []
    async with contextlib.AsyncExitStack() as stack:
        async with nats_server(tmp_path / "nats") as first:
            port, url = first.port, first.url
            gateway = await stack.enter_async_context(plane(url, namespace))
            worker = await stack.enter_async_context(plane(url, namespace))
            gateway.on_connect(lambda: connected.append(True))
            await gateway.subscribe_kv(seen)
            await gateway.flush()
            await worker.publish_kv(batch(1))
            await seen.until(lambda: len(seen.messages) == 1)
        async with asyncio.timeout(60):
            while gateway.is_connected or worker.is_connected:  # noqa: ASYNC110 - a plain attribute, on purpose
                await asyncio.sleep(0.02)
        await worker.publish_kv(batch(2))
        assert worker.counters.dropped == 1
        with pytest.raises(EventPlaneUnavailable):
            await gateway.request_snapshot(WORKER)
        await gateway.subscribe_load(seen)  # while there is no connection
        async with nats_server(tmp_path / "nats", port):
            await gateway.wait_connected(60)
            await worker.wait_connected(60)
            await gateway.flush()
            await worker.publish_kv(batch(3))
            await worker.publish_load(report(3))
            await seen.until(lambda: len(seen.messages) == 3)
    assert seen.messages == [batch(1), batch(3), report(3)]
    assert connected == [True]


async def test_a_nats_that_stalls_neither_blocks_nor_fills_the_publisher(tmp_path: Path, namespace: str) -> None:
    async with nats_server(tmp_path / "nats") as server, plane(server.url, namespace) as worker:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            large = KvEvents(WORKER, 1, 1, [BlocksStored(bytes(100_000))])
            async with asyncio.timeout(60):
                for _ in range(400):  # 40 MB
                    await worker.publish_kv(large)
                    await asyncio.sleep(0)
            assert worker.counters.dropped > 200
            assert worker._client is not None
            assert worker._client.pending_data_size <= 1024 * 1024
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await worker.flush(60)
        published = worker.counters.published
        await worker.publish_kv(large)
        assert worker.counters.published == published + 1


async def test_a_process_that_starts_before_nats_connects_when_it_comes(tmp_path: Path, namespace: str) -> None:
    async with nats_server(tmp_path / "nats") as first:
        port, url = first.port, first.url
    async with plane(url, namespace, is_waiting=False) as early:
        with pytest.raises(EventPlaneUnavailable, match="no connection"):
            await early.wait_connected(0.05)
        seen = Seen()
        await early.subscribe_kv(seen)
        async with nats_server(tmp_path / "nats", port):
            await early.wait_connected(60)
            await early.publish_kv(batch(1))
            await seen.until(lambda: seen.messages == [batch(1)])


async def test_a_job_is_done_once(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway, plane(nats_url, namespace) as worker:
        sending, taking = PrefillQueue(gateway), PrefillQueue(worker)
        for job_id in ("a", "b", "a"):
            await sending.submit(MODEL, job_id.encode(), job_id)
        stats = await sending.stats(MODEL)
        assert (stats.depth, stats.num_in_progress) == (2, 0)
        jobs = await taking.pull(MODEL, 8, timeout_s=60)
        assert [(job.payload, job.job_id, job.num_deliveries) for job in jobs] == [(b"a", "a", 1), (b"b", "b", 1)]
        assert (await sending.stats(MODEL)).num_in_progress == 2
        for job in jobs:
            await job.ack()
        await worker.flush()
        assert await taking.pull(MODEL, 8, timeout_s=0.05) == []
        assert (await sending.stats(MODEL)).num_in_progress == 0


async def test_a_waiting_worker_gets_the_next_job(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway, plane(nats_url, namespace) as worker:
        waiting = asyncio.create_task(PrefillQueue(worker).pull(MODEL, 4, timeout_s=30))
        queue = PrefillQueue(gateway)
        await queue.submit(MODEL, b"1", "1")
        assert [job.payload for job in await waiting] == [b"1"]


async def test_jobs_of_another_model_stay_where_they_are(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway:
        queue = PrefillQueue(gateway)
        await queue.submit("one", b"1", "1")
        await queue.submit("two", b"2", "2")
        assert [job.payload for job in await queue.pull("two", 4, timeout_s=60)] == [b"2"]
        assert (await queue.stats("one")).depth == 1


async def test_a_job_whose_worker_died_goes_to_another(nats_url: str, namespace: str) -> None:
    limits = JobLimits(ack_wait_s=0.5)
    async with plane(nats_url, namespace) as gateway:
        queue = PrefillQueue(gateway, limits)
        async with plane(nats_url, namespace) as dying:
            await queue.submit(MODEL, b"1", "1")
            assert len(await PrefillQueue(dying, limits).pull(MODEL, 1, timeout_s=60)) == 1
        again = await queue.pull(MODEL, 1, timeout_s=10)
        assert [(job.job_id, job.num_deliveries) for job in again] == [("1", 2)]
        await again[0].nak()
        third = await queue.pull(MODEL, 1, timeout_s=10)
        assert third[0].num_deliveries == 3
        await third[0].in_progress()
        await third[0].ack()


async def test_a_cancelled_pull_keeps_no_job(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway, plane(nats_url, namespace) as worker:
        queue = PrefillQueue(worker)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await queue.pull(MODEL, 1, timeout_s=30)
        await worker.flush()
        await PrefillQueue(gateway).submit(MODEL, b"1", "1")
        assert [job.num_deliveries for job in await queue.pull(MODEL, 1, timeout_s=60)] == [1]


async def test_a_full_queue_rejects(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway:
        queue = PrefillQueue(gateway, JobLimits(max_jobs=1))
        await queue.submit(MODEL, b"1", "1")
        with pytest.raises(PrefillQueueFull, match="limit of 1 jobs"):
            await queue.submit(MODEL, b"2", "2")


async def test_changed_limits_are_taken_over(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway:
        await PrefillQueue(gateway, JobLimits(max_jobs=1)).submit(MODEL, b"1", "1")
        larger = PrefillQueue(gateway, JobLimits(max_jobs=2, ack_wait_s=7))
        await larger.submit(MODEL, b"2", "2")
        assert (await larger.stats(MODEL)).depth == 2


async def test_the_age_is_that_of_the_oldest_job_nobody_took(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway:
        queue = PrefillQueue(gateway)
        await queue.submit(MODEL, b"1", "1")
        await queue.submit(MODEL, b"2", "2")
        assert 0 < (await queue.stats(MODEL)).oldest_age_s < 60
        await queue.pull(MODEL, 2, timeout_s=60)
        assert (await queue.stats(MODEL)).oldest_age_s == 0


async def test_ages_are_the_same_whatever_our_clock_says(nats_url: str, namespace: str) -> None:
    async with plane(nats_url, namespace) as gateway:
        behind = PrefillQueue(gateway, clock=lambda: time.monotonic() - 1e6)
        ahead = PrefillQueue(gateway, clock=lambda: time.monotonic() + 1e6)
        for queue in (behind, ahead):
            await queue.submit(MODEL, b"1", str(id(queue)))
            assert 0 < (await queue.stats(MODEL)).oldest_age_s < 60
            (job,) = await queue.pull(MODEL, 1, timeout_s=60)
            assert 0 < job.age_s < 60
            await job.ack()


async def test_snapshots_and_publications_fit_a_server_that_takes_little(tmp_path: Path) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 50_000, dtype=np.uint64).astype("<u8").tobytes()
    told, is_complete = CachedBlocks(), asyncio.Event()

    def apply(batch: KvEvents) -> None:
        for event in batch.events:
            told.apply(event)
        if len(told) == 50_000:
            is_complete.set()

    async with own_nats(tmp_path / "nats", "max_payload: 65536\n") as url, plane(url, "ns") as gateway:
        await gateway.subscribe_kv(apply)
        await gateway.flush()
        async with plane(url, "ns", is_waiting=False) as worker, asyncio.TaskGroup() as tasks:
            publisher = Publisher(WORKER, 1, worker, load=EngineLoad, on_death=pytest.fail)
            publishing = tasks.create_task(publisher.run())
            await worker.wait_connected(60)
            publisher.kv_changed([BlocksStored(hashes)])
            async with asyncio.timeout(60):
                await is_complete.wait()
            snapshot = await gateway.request_snapshot(WORKER)
            assert sorted(unpack(snapshot.hashes).tolist()) == sorted(unpack(hashes).tolist())
            assert worker.counters.dropped == 0
            publishing.cancel()
