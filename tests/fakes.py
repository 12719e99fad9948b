"""Fakes that several tests share."""

import asyncio
from contextlib import asynccontextmanager

from app.openai import errors
from planes.bucket import ObjectMissing
from planes.control import ControlPlaneUnavailable
from planes.entries import Entry
from planes.keyed import ValueTooLarge
from planes.streams.client import WorkerUnreachable
from planes.wire.frames import Generate
from planes.wire.messages import (
    EngineFacts,
    GatewayNews,
    HandoverEndpoint,
    HandoverMode,
    Registration,
    RequestId,
    Role,
    WorkerId,
    WorkerState,
)
from router.request import Candidate, RoutableRequest, Route

DEEP = b'{"?":' + b"[" * 20_000 + b"]" * 20_000 + b"}"
"""JSON with a field that nobody knows and that is read over, one call of msgspec's to a bracket."""
DEEP_PACKED = b"\x81\xa1?" + b"\x91" * 20_000 + b"\xc0"
"""The same in MessagePack."""
FACTS = EngineFacts(
    block_size=16,
    num_blocks=1000,
    context_length=4096,
    max_batch=8,
    max_step_tokens=2048,
    bytes_per_block=1000,
    vocab_size=300,
)


def registration(
    worker: str,
    role: Role = Role.BOTH,
    *,
    epoch: int = 1,
    mode: HandoverMode | None = HandoverMode.PULL,
    state: WorkerState = WorkerState.READY,
    address: str = "127.0.0.1:1",
    card_digest: str = "0" * 64,
    model: str = "sim",
) -> Registration:
    endpoint = None if mode is None else HandoverEndpoint(mode, f"{worker}-{epoch}", "127.0.0.1", 5600)
    return Registration(
        WorkerId(worker), epoch, role, model, address, "sim", FACTS, card_digest, handover=endpoint, state=state
    )


def route(request: str, decode: str, prefill: str | None = None) -> Route:
    chosen = candidate(decode, prefill)
    return Route(
        request=RequestId(request),
        prefill=chosen.prefill,
        decode=chosen.decode,
        cached_tokens=0,
        decode_cached_tokens=0,
        predicted=chosen,
        policy="fake",
    )


def candidate(decode: str, prefill: str | None = None, **fields) -> Candidate:
    """One way to serve a request; what is not given costs little or nothing."""
    seconds = {"queue_s": 0.0, "prefill_s": 0.1, "handover_s": 0.0, "first_step_s": 0.01, "inflicted_s": 0.0}
    return Candidate(
        prefill=None if prefill is None else WorkerId(prefill),
        decode=WorkerId(decode),
        **{"cached_tokens": 0, "decode_cached_tokens": 0, "total_s": 0.11} | seconds | fields,
    )


class FakeRouter:
    """Records what it is told and answers what the test has put into `answers`."""

    def __init__(self):
        self.waiting: dict[RequestId, RoutableRequest] = {}
        self.submitted: list[RoutableRequest] = []
        self.bound: set[RequestId] = set()
        self.released: list = []
        self.withdrawn: list[RequestId] = []
        self.prefills: list[RequestId] = []
        self.timelines: list = []
        self.up: dict[WorkerId, Registration] = {}
        self.log: list = []
        self.answers: list = []
        self.wakes_at: float | None = None
        self.refuses: Exception | None = None
        self.raises: Exception | None = None
        self.stale: list[WorkerId] = []

    def ended(self, request, timeline):
        self.timelines.append((request, timeline))

    def submit(self, request, *, now):
        if self.refuses is not None:
            raise self.refuses
        assert request.request not in self.waiting
        assert request.request not in self.bound
        self.waiting[request.request] = request
        self.submitted.append(request)

    def dispatch(self, *, now):
        self.log.append("dispatch")
        if self.raises is not None:
            raise self.raises
        ready = []
        for answer in list(self.answers):
            if answer.request in self.waiting:
                ready.append(answer)
                self.answers.remove(answer)
                del self.waiting[answer.request]
                if isinstance(answer, Route):
                    self.bound.add(answer.request)
        return ready

    def wakeup(self):
        return self.wakes_at

    def withdraw(self, request, *, now):
        self.waiting.pop(request, None)
        self.withdrawn.append(request)

    def is_bound(self, request):
        return request in self.bound

    def prefilled(self, request, *, now):
        assert request in self.bound
        self.prefills.append(request)

    def release(self, request, observed, *, now):
        self.bound.remove(request)
        self.released.append((request, observed))

    def worker_up(self, registration):
        self.up[registration.worker] = registration

    def worker_down(self, worker):
        del self.up[worker]

    def apply_events(self, batch):
        self.log.append(batch)

    def apply_load(self, report, *, now):
        self.log.append(report)

    def apply_snapshot(self, snapshot):
        self.log.append(snapshot)
        self.stale.remove(snapshot.worker)

    def workers_to_snapshot(self):
        return self.stale


class FakeEntries:
    """`planes.entries.Entries` and `OpenEntries` in one, shared by all gateways of a test.

    is_away: etcd does not answer.  fails_before_swap, fails_after_swap: it ends in the middle of a change.
    """

    def __init__(self):
        self.values: dict[str, Entry] = {}
        self.num_swaps = self.revision = 0
        self.is_away = self.fails_before_swap = self.fails_after_swap = False
        self.told = asyncio.Event()

    async def find(self, name):
        await self._answer(self.is_away)
        return self.values.get(name)

    async def list(self, start="", end=None):
        await self._answer(self.is_away)
        return {
            name: self.values[name] for name in sorted(self.values) if start <= name and (end is None or name < end)
        }

    async def swap(self, name, value, *, revision):
        await self._answer(self.is_away or self.fails_before_swap)
        found = self.values.get(name)
        if revision != (0 if found is None else found.revision):
            return False
        self.num_swaps += 1
        self.revision += 1
        self.values[name] = Entry(value, self.revision)
        self.told.set()
        await self._answer(self.fails_after_swap)
        return True

    async def drop(self, end):
        self.values = {name: entry for name, entry in self.values.items() if name >= end}

    async def keep(self, work):
        while True:
            try:
                return await work(self, lambda: None)
            except ControlPlaneUnavailable:
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def opened(self):
        yield self

    @staticmethod
    async def _answer(is_away):
        await asyncio.sleep(0)
        if is_away:
            raise ControlPlaneUnavailable("away")


class FakeConnection:
    """The gateway's end of a stream; the test speaks for the worker through `sinks`."""

    def __init__(self, worker: str):
        self.worker = WorkerId(worker)
        self.started: list[Generate] = []
        self.sinks: list = []
        self.cancelled: list[int] = []
        self.released: list[RequestId] = []
        self.on_rest = None
        """Who was told last what had been used when a stream was cancelled."""
        self.refuses = False
        self.script = None
        """Called with each request and its sink, in the same turn."""

    def start(self, request, sink):
        if self.refuses:
            raise WorkerUnreachable(self.worker, "gone")
        self.started.append(request)
        self.sinks.append(sink)
        if self.script is not None:
            self.script(request, sink)
        return len(self.started)

    def cancel(self, stream, on_rest=None):
        self.cancelled.append(stream)
        self.on_rest = on_rest

    def release(self, request):
        self.released.append(request)


class FakeWorkers:
    """What the relay asks of the fleet."""

    def __init__(self, *registrations: Registration):
        self.registrations = {each.worker: each for each in registrations}
        self.connections: dict[str, FakeConnection] = {
            each.worker: FakeConnection(each.worker) for each in registrations
        }
        self.watchers = {}

    def watch_joins(self, on_joined):
        key = object()
        self.watchers[key] = on_joined
        return lambda: self.watchers.pop(key)

    def join(self, worker="new"):
        for on_joined in list(self.watchers.values()):
            on_joined(WorkerId(worker))

    def connection(self, worker):
        return self.connections[worker]

    def registration(self, worker):
        return self.registrations[worker]


class FakeResponse:
    """Keeps what the client gets."""

    def __init__(self):
        self.payloads: list[bytes] = []
        self.headers: dict[str, str] = {}
        self.status: int | None = None
        self.body: bytes | None = None
        self.is_begun = self.is_gone = self.is_ended = False

    def begin(self, headers):
        assert not self.is_begun
        self.is_begun, self.status, self.headers = True, 200, dict(headers)

    def write(self, payload):
        assert payload
        assert self.is_begun
        assert not self.is_ended
        self.payloads.append(payload)

    def end(self, last=b""):
        assert self.is_begun
        if last:
            self.write(last)
        assert not self.is_ended
        self.is_ended = True

    def keep_alive(self):
        assert self.is_begun
        assert not self.is_ended
        self.payloads.append(b": keep-alive\n\n")

    def whole(self, status, headers, body):
        assert not self.is_begun
        self.is_begun = self.is_ended = True
        self.status, self.headers, self.body = status, dict(headers), body

    def fail(self, exc, headers):
        if self.is_begun:
            self.end(errors.sse_event(exc))
        else:
            refusal = errors.response(exc)
            self.whole(refusal.status, [*refusal.headers.items(), *headers], refusal.body)


class FakeValues:
    """As `planes.keyed.KeyedStore`, in memory. `fails`: what every call raises."""

    piece_bytes = 100

    def __init__(self, max_value_bytes=1 << 20):
        self.max_value_bytes = max_value_bytes
        self.held: dict[str, tuple[int, bytes]] = {}
        self.fails: Exception | None = None
        self.listeners: list[tuple[str, asyncio.Queue]] = []
        self._written = 0

    def _check(self):
        if self.fails is not None:
            raise self.fails

    async def check(self):
        self._check()

    async def get(self, key):
        self._check()
        if key not in self.held:
            raise ObjectMissing(key)
        return self.held[key][1]

    async def put(self, key, value):
        self._check()
        if len(value) > self.max_value_bytes:
            raise ValueTooLarge(len(value), self.max_value_bytes)
        self._written += 1
        self.held[key] = self._written, value
        for prefix, queue in self.listeners:
            if key.startswith(f"{prefix}."):
                queue.put_nowait(value)

    async def delete(self, prefix):
        self._check()
        self.held = {key: held for key, held in self.held.items() if not key.startswith(f"{prefix}.")}

    async def next(self, prefix, after=0):
        self._check()
        found = sorted(held for key, held in self.held.items() if key.rpartition(".")[0] == prefix and held[0] > after)
        if not found:
            raise ObjectMissing(prefix)
        return found[0][1], found[0][0]

    @asynccontextmanager
    async def changes(self, prefix):
        self._check()
        queue: asyncio.Queue = asyncio.Queue()
        self.listeners.append((prefix, queue))
        try:
            yield FakeChanges(queue)
        finally:
            self.listeners.remove((prefix, queue))


class FakeChanges:
    """What is written under a prefix; nobody waits in vain."""

    def __init__(self, queue):
        self._queue = queue

    async def next(self, timeout_s):
        del timeout_s
        return await self._queue.get()


class FakeNewsPlane:
    """Keeps what a gateway tells the others."""

    def __init__(self) -> None:
        self._published: asyncio.Queue[GatewayNews] = asyncio.Queue()

    async def publish_news(self, news: GatewayNews) -> None:
        self._published.put_nowait(news)

    async def flush(self) -> None: ...

    async def next(self) -> GatewayNews:
        return await self._published.get()
