"""The worker process with the simulated engine, as etcd, NATS and a gateway's connection see it."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from app.cli.servers import tied_to_parent
from planes.assets import fetch_card
from planes.control import Etcd, WorkerDirectory, WorkerIdTaken
from planes.events import EventPlane
from planes.objects import ObjectStore
from planes.role_wishes import put_role_wish
from planes.streams.client import WorkerConnection
from planes.wire.blocks import digest, unpack
from planes.wire.frames import (
    DecodeLeg,
    Done,
    Failed,
    FailureKind,
    FinishReason,
    Format,
    Generate,
    LocalLeg,
    PrefillLeg,
    Sampling,
    StreamId,
    pack_tokens,
)
from planes.wire.messages import (
    BlocksRemoved,
    BlocksStored,
    EngineFacts,
    HandoverMode,
    Registration,
    RequestId,
    Role,
    RoleWish,
    WorkerState,
)
from workers.main import Ending, serve
from workers.settings import WorkerSettings
from workers.sim.engine import SimEngine, SimOptions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROMPT = list(b"Tell me something about rivers, mills and wheels.")


@dataclass
class Worker:
    process: Process
    lines: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.lines.append(line.decode().rstrip())
            self.news.set()
        self.lines.append("(it ended)")
        self.news.set()

    async def line_with(self, words: str) -> str:
        async with asyncio.timeout(60):
            while True:
                for line in self.lines:
                    if words in line:
                        return line
                assert "(it ended)" not in self.lines, self.lines
                await self.news.wait()
                self.news.clear()


@asynccontextmanager
async def started(*flags: str) -> AsyncIterator[Worker]:
    """A worker process, perhaps not ready yet; killed at the end if it still runs."""
    argv = tied_to_parent([sys.executable, "-m", "workers", "--engine", "sim", *flags])
    worker = Worker(await asyncio.create_subprocess_exec(*argv, stdout=DEVNULL, stderr=PIPE))
    reader = asyncio.create_task(worker.read())
    try:
        yield worker
    finally:
        if worker.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
        await worker.process.wait()
        await reader


@dataclass
class Fleet:
    """Starts workers of one namespace, and knows what is registered."""

    etcd_url: str
    nats_url: str
    namespace: str
    workers: dict[str, Registration] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def up(self, registration: Registration) -> None:
        self.workers[registration.worker] = registration
        self.changed.set()

    def down(self, worker: str) -> None:
        del self.workers[worker]
        self.changed.set()

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not is_true():
                await self.changed.wait()
                self.changed.clear()

    async def wish(self, name: str, role: Role, *, epoch: int | None = None) -> None:
        """Ask a registered worker, or an earlier life of it, to change its role."""
        found = self.workers[name]
        wish = RoleWish(found.epoch if epoch is None else epoch, role)
        await put_role_wish(Etcd(self.etcd_url), self.namespace, found.worker, wish)

    @asynccontextmanager
    async def worker(self, name: str, *flags: str, speedup: int = 10) -> AsyncIterator[tuple[Worker, WorkerConnection]]:
        """A ready worker and a connection to it."""
        where = ["--etcd", self.etcd_url, "--nats", self.nats_url, "--namespace", self.namespace, "--worker-id", name]
        async with started(*where, "--speedup", str(speedup), *flags) as worker:
            await worker.line_with("event=worker.ready")
            async with self.connection(name) as connection:
                yield worker, connection

    @asynccontextmanager
    async def connection(self, name: str) -> AsyncIterator[WorkerConnection]:
        """To a worker, once it is registered."""
        await self.until(lambda: name in self.workers)
        found = self.workers[name]
        connection = await WorkerConnection.open(found.worker, found.epoch, found.address, timeout_s=60.0)
        try:
            yield connection
        finally:
            connection.close()


@pytest.fixture
async def fleet(etcd_url: str, nats_url: str, namespace: str) -> AsyncIterator[Fleet]:
    fleet = Fleet(etcd_url, nats_url, namespace)
    directory = WorkerDirectory(Etcd(etcd_url), namespace, on_up=fleet.up, on_down=fleet.down)
    task = asyncio.create_task(directory.run())
    yield fleet
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Answer:
    """Collects one stream."""

    stream: StreamId

    def __init__(self) -> None:
        self.payload = b""
        self.tokens: list[int] = []
        self.spoke = asyncio.Event()
        self.ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def on_delta(self, payload: bytes, tokens: list[int]) -> None:
        self.payload += payload
        self.tokens += tokens
        self.spoke.set()

    def on_done(self, done: Done) -> None:
        self.on_delta(done.payload, done.tokens)
        self.ended.set_result(done)

    def on_failed(self, failed: Failed) -> None:
        self.ended.set_result(failed)

    def on_lost(self, error: Exception) -> None:
        self.ended.set_result(error)

    async def done(self) -> Done:
        async with asyncio.timeout(60):
            ended = await self.ended
        assert isinstance(ended, Done), ended
        return ended

    @property
    def text(self) -> str:
        events = [json.loads(event[6:]) for event in self.payload.decode().split("\n\n") if event.startswith("data: {")]
        return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def ask(connection, name="r1", *, max_tokens=24, leg=None, resume=(), is_streaming=True, prompt=PROMPT, **changes):
    answer = Answer()
    request = Generate(
        stream=StreamId(0),
        request=RequestId(name),
        prompt=pack_tokens(list(prompt)),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **changes),
        format=Format("chat", "chatcmpl-1", "sim", 1, is_streaming=is_streaming),
        leg=leg or LocalLeg(),
        resume=pack_tokens(list(resume)),
        timeout_s=30.0,
    )
    answer.stream = connection.start(request, answer)
    return answer


async def test_a_ready_worker_is_registered_with_what_gateways_need(fleet, tmp_path):
    async with fleet.worker("both-1", "--block-size", "8", "--context-length", "512"):
        found = fleet.workers["both-1"]
        assert (found.role, found.model, found.engine, found.state) == (Role.BOTH, "sim", "sim", WorkerState.READY)
        assert (found.facts.block_size, found.facts.context_length) == (8, 512)
        assert found.handover is not None
        assert found.handover.mode is HandoverMode.PULL
        plane = EventPlane(fleet.nats_url, fleet.namespace)
        task = asyncio.create_task(plane.run())
        await plane.wait_connected(60)
        loaded = await fetch_card(ObjectStore(plane), found.card_digest, tmp_path)
        assert loaded.card.block_size == 8
        assert "chat_template" in json.loads(loaded.files["tokenizer_config.json"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_stream_brings_text_its_tokens_and_usage(fleet):
    async with fleet.worker("both-1") as (_, connection):
        first = ask(connection, "r1")
        done = await first.done()
        assert done.reason is FinishReason.LENGTH
        assert first.text.encode() == bytes(first.tokens)
        assert (done.usage.prompt_tokens, done.usage.completion_tokens, len(first.tokens)) == (len(PROMPT), 24, 24)
        assert first.payload.endswith(b"data: [DONE]\n\n")
        again = ask(connection, "r2", is_streaming=False)
        done = await again.done()
        body = json.loads(again.payload)
        assert body["choices"][0]["message"]["content"] == first.text
        assert done.usage.cached_tokens == len(PROMPT) // 16 * 16


async def test_a_stop_string_and_a_limit_of_choices_are_obeyed(fleet):
    async with fleet.worker("both-1") as (_, connection):
        whole = ask(connection, "r1")
        await whole.done()
        stop = whole.text[10:12]
        cut = ask(connection, "r2", stop=[stop])
        assert (await cut.done()).reason is FinishReason.STOP
        assert cut.text == whole.text[: whole.text.index(stop)]
        several = ask(connection, "r3", n=3, is_streaming=False)
        await several.done()
        assert len(json.loads(several.payload)["choices"]) == 3


async def test_a_stream_resumed_on_another_worker_goes_on_with_the_same_bytes(fleet):
    async with fleet.worker("both-1") as (_, one), fleet.worker("both-2") as (_, two):
        whole = ask(one)
        await whole.done()
        for count in (1, 7, 23):
            rest = ask(two, f"r{count}", resume=whole.tokens[:count])
            await rest.done()
            assert rest.tokens == whole.tokens[count:]
            assert whole.payload.endswith(rest.payload)


@pytest.mark.parametrize("is_emitting", [False, True])
async def test_a_pulled_prompt_gives_the_answer_of_one_worker(fleet, is_emitting):
    async with (
        fleet.worker("prefill-1", "--role", "prefill") as (_, prefill),
        fleet.worker("decode-1", "--role", "decode") as (_, decode),
        fleet.worker("both-1") as (_, both),
    ):
        alone = ask(both)
        await alone.done()
        first = ask(prefill, leg=PrefillLeg(HandoverMode.PULL, emit_first=is_emitting))
        ticket = (await first.done()).ticket
        rest = ask(decode, leg=DecodeLeg(ticket=ticket), resume=first.tokens)
        done = await rest.done()
        assert first.tokens + rest.tokens == alone.tokens
        assert first.payload + rest.payload == alone.payload
        assert len(first.tokens) == is_emitting
        assert done.usage.handover_bytes > 0
        assert done.usage.cached_tokens == 0


async def test_a_pushed_prompt_gives_the_answer_of_one_worker(fleet):
    push = ("--handover", "push")
    async with (
        fleet.worker("prefill-1", "--role", "prefill", *push) as (_, prefill),
        fleet.worker("decode-1", "--role", "decode", *push) as (_, decode),
        fleet.worker("both-1") as (_, both),
    ):
        alone = ask(both)
        await alone.done()
        answer = ask(decode, leg=DecodeLeg(source=fleet.workers["prefill-1"].handover))
        giver = ask(prefill, leg=PrefillLeg(HandoverMode.PUSH))
        await giver.done()
        await answer.done()
        assert answer.payload == alone.payload


async def test_a_kv_cache_waits_for_its_decode_worker_whatever_becomes_of_its_own_worker(fleet):
    async with (
        fleet.worker("prefill-1", "--role", "prefill") as (_, prefill),
        fleet.worker("decode-1", "--role", "decode") as (_, decode),
        fleet.worker("both-1") as (_, both),
    ):
        alone = ask(both)
        await alone.done()
        first = ask(prefill, leg=PrefillLeg(HandoverMode.PULL))
        ticket = (await first.done()).ticket
        await fleet.wish("prefill-1", Role.DECODE)
        await fleet.until(lambda: fleet.workers["prefill-1"].role is Role.DECODE)
        failed = await ask(prefill, "r2", leg=PrefillLeg(HandoverMode.PULL)).ended
        assert (failed.kind, failed.code) == (FailureKind.REJECTED, "role_changed")
        rest = ask(decode, leg=DecodeLeg(ticket=ticket), resume=first.tokens)
        done = await rest.done()
        assert first.payload + rest.payload == alone.payload
        assert done.usage.handover_bytes > 0
        own = ask(prefill, "r3")
        await own.done()
        assert own.tokens == alone.tokens


async def test_a_wish_for_an_earlier_life_of_the_worker_is_not_followed(fleet):
    async with fleet.worker("both-1") as (worker, _):
        await fleet.wish("both-1", Role.PREFILL, epoch=fleet.workers["both-1"].epoch - 1)
        await worker.line_with("event=role.refused")
        await fleet.wish("both-1", Role.DECODE)
        await fleet.until(lambda: fleet.workers["both-1"].role is Role.DECODE)
        assert not any("role=prefill" in line for line in worker.lines if "event=role.chang" in line)
        assert fleet.workers["both-1"].is_pulling is False


async def test_a_request_that_could_hurt_the_engine_is_invalid_and_the_next_one_is_served(fleet):
    async with fleet.worker("both-1", "--context-length", "128") as (_, connection):
        for name, changes, words in (
            ("r1", {"prompt": []}, "no tokens"),
            ("r2", {"prompt": [260]}, "the vocabulary ends at 259"),
            ("r3", {"max_tokens": 120}, "the context holds 128"),
        ):
            failed = await ask(connection, name, **changes).ended
            assert failed.kind is FailureKind.INVALID
            assert words in failed.message
        failed = await ask(connection, "r4", leg=PrefillLeg(HandoverMode.PUSH)).ended
        assert (failed.kind, failed.code) == (FailureKind.REJECTED, "handover_refused")
        await ask(connection, "r5").done()


async def test_what_is_published_adds_up_to_what_is_held(fleet):
    plane = EventPlane(fleet.nats_url, fleet.namespace)
    held: set[int] = set()
    reports, news = [], asyncio.Event()

    def on_kv(batch):
        for event in batch.events:
            names = unpack(event.hashes).tolist() if isinstance(event, BlocksStored | BlocksRemoved) else held
            held.update(names) if isinstance(event, BlocksStored) else held.difference_update(names)

    def on_load(report):
        reports.append(report)
        news.set()

    await plane.subscribe_kv(on_kv)
    await plane.subscribe_load(on_load)
    task = asyncio.create_task(plane.run())
    await plane.wait_connected(60)
    flags = ("--num-blocks", "64", "--context-length", "256", "--max-batch", "8")
    async with fleet.worker("both-1", *flags) as (_, connection), asyncio.timeout(60):
        answers = [ask(connection, f"r{i}", prompt=[i] * 100, max_tokens=40) for i in range(24)]
        for answer in answers:
            await answer.done()
        ended_at = len(reports)
        while len(reports) < ended_at + 2:
            await news.wait()
            news.clear()
        last = reports[-1]
        assert (last.num_running, last.num_waiting, last.free_blocks) == (0, 0, 64)
        assert last.num_cached == len(held) > 0
        assert last.digest == digest(unpack((await plane.request_snapshot(last.worker)).hashes))
        assert sum(sample.prefill_tokens for report in reports for sample in report.steps) >= 24 * 100
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_cancelled_request_leaves_the_engine(fleet):
    async with fleet.worker("both-1", "--max-batch", "1", speedup=1) as (_, connection):
        endless = ask(connection, "r1", max_tokens=5000)
        await endless.spoke.wait()
        connection.cancel(endless.stream)
        assert (await ask(connection, "r2").done()).usage.completion_tokens == 24


async def test_sigterm_lets_running_streams_end_and_takes_no_new_ones(fleet):
    async with fleet.worker("both-1", speedup=1) as (worker, connection):
        running = ask(connection, "r1", max_tokens=1000)
        await running.spoke.wait()
        worker.process.send_signal(signal.SIGTERM)
        await fleet.until(lambda: fleet.workers["both-1"].state is WorkerState.DRAINING)
        failed = await ask(connection, "r2").ended
        assert (failed.kind, failed.code) == (FailureKind.REJECTED, "worker_draining")
        assert (await running.done()).usage.completion_tokens == 1000
        assert await worker.process.wait() == 0
        await fleet.until(lambda: "both-1" not in fleet.workers)


async def test_what_does_not_end_in_time_is_interrupted(fleet):
    async with fleet.worker("both-1", "--drain-s", "0.1", speedup=1) as (worker, connection):
        running = ask(connection, "r1", max_tokens=10000)
        await running.spoke.wait()
        worker.process.send_signal(signal.SIGINT)
        failed = await running.ended
        assert (failed.kind, failed.code) == (FailureKind.INTERRUPTED, "worker_stopping")
        assert await worker.process.wait() == 0


async def test_a_killed_worker_is_noticed_at_once_by_its_streams(fleet):
    async with fleet.worker("both-1", speedup=1) as (worker, connection):
        running = ask(connection, "r1", max_tokens=5000)
        await running.spoke.wait()
        worker.process.kill()
        async with asyncio.timeout(60):
            assert "both-1" in str(await running.ended)


class MortalEngine(SimEngine):
    async def start(self, observer, *, progress):
        await super().start(observer, progress=progress)
        self.observer = observer


async def test_a_worker_whose_engine_dies_interrupts_its_streams_and_ends_with_status_1(fleet):
    engines = []

    def make(settings, worker, *, vocab_size, reasoning_parser):
        facts = EngineFacts(16, 64, 512, 8, 512, 1024, vocab_size)
        engines.append(MortalEngine(SimOptions(worker=worker, model="sim", facts=facts, handover=None)))
        return engines[0]

    settings = WorkerSettings(
        engine="sim", etcd=fleet.etcd_url, nats=fleet.nats_url, namespace=fleet.namespace, worker_id="both-1"
    )
    life = asyncio.create_task(serve(settings, Ending(), make_engine=make))
    async with fleet.connection("both-1") as connection:
        running = ask(connection, max_tokens=400)
        await running.spoke.wait()
        engines[0].observer.died("out of memory")
        failed = await running.ended
    assert (failed.kind, failed.code) == (FailureKind.INTERRUPTED, "engine_died")
    assert "out of memory" not in failed.message  # that is for the log
    assert await life == 1
    await fleet.until(lambda: not fleet.workers)


async def test_a_worker_waits_for_an_etcd_that_is_away_and_can_be_stopped_meanwhile(nats_url, namespace):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    async with started("--etcd", nobody, "--nats", nats_url, "--namespace", namespace) as worker:
        await worker.line_with("event=etcd.unavailable")
        assert worker.process.returncode is None
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.process.wait() == 0
        assert not any("worker.ready" in line for line in worker.lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--block-size", "x"], "block-size"),
        (["--model", "/nowhere"], "--model is '/nowhere'"),
        (["--num-blocks", "1"], "raise num_blocks"),
        (["--cores", "4000"], "--cores is '4000'"),
    ],
)
async def test_a_worker_that_cannot_start_says_why_in_one_line_and_ends_with_status_2(flags, words):
    async with started(*flags) as worker:
        assert await worker.process.wait() == 2
    said = [line for line in worker.lines[:-1] if "event=worker.progress" not in line]
    assert len(said) == 1
    assert words in said[0]


async def test_a_taken_port_ends_the_start(fleet):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with started("--port", port) as worker:
            assert await worker.process.wait() == 2
    assert f"--port is {port}" in worker.lines[-2]


async def test_the_id_of_a_running_worker_ends_the_start_and_the_other_serves_on(fleet):
    where = ["--etcd", fleet.etcd_url, "--nats", fleet.nats_url, "--namespace", fleet.namespace]
    async with fleet.worker("both-1") as (_, connection):
        address = fleet.workers["both-1"].address
        async with started("--worker-id", "both-1", *where) as second:
            assert await second.process.wait() == 2
        assert second.lines[-2].startswith("headrace: --worker-id is 'both-1': ")
        assert address in second.lines[-2]
        assert fleet.workers["both-1"].address == address
        await ask(connection).done()


async def test_a_worker_whose_id_is_taken_while_it_starts_ends_in_order(fleet):
    """As above; the other came after this one had asked whether the id is free."""
    settings = WorkerSettings(
        engine="sim", etcd=fleet.etcd_url, nats=fleet.nats_url, namespace=fleet.namespace, worker_id="both-1"
    )

    class SlowEngine(SimEngine):
        async def start(self, observer, *, progress):
            await super().start(observer, progress=progress)
            await fleet.until(lambda: "both-1" in fleet.workers)

    def make(settings, worker, *, vocab_size, reasoning_parser):
        facts = EngineFacts(16, 64, 512, 8, 512, 1024, vocab_size)
        return SlowEngine(SimOptions(worker=worker, model="sim", facts=facts, handover=None))

    life = asyncio.create_task(serve(settings, Ending(), make_engine=make))
    async with fleet.worker("both-1") as (_, connection):
        with pytest.raises(WorkerIdTaken, match="--worker-id is 'both-1'"):
            await life
        await ask(connection).done()
