"""Whatever peers say and etcd holds: the gateway lives, and a request for somebody else's model is served."""

import asyncio
import random
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.fleet.connections import WorkerConnections
from app.fleet.routing_config import RoutingConfig, RoutingConfigFollower, routing_setup
from app.metrics import Metrics, router_gauges
from app.prompt.catalog import Models
from app.serving.binding import Dispatcher, RouterBroken
from app.settings import GatewaySettings
from planes.assets import make_card, read_model_files, sha256
from planes.control import Etcd, WorkerDirectory, workers_prefix
from planes.events import EventPlane
from planes.wire.errors import HeadraceError, Rejected
from planes.wire.messages import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    KvEvents,
    LatencyPrior,
    LoadReport,
    Registration,
    RequestId,
    Role,
    Snapshot,
    StepSample,
    WorkerId,
    WorkerState,
)
from router.request import Observed, RoutableRequest
from router.router import Router
from tests.fakes import registration

FILES = read_model_files(Path(__file__).parents[4] / "workers" / "sim" / "model")
GOOD, BAD = WorkerId("good"), WorkerId("bad")
HOSTILE_MODEL = "theirs"


class Store:
    def __init__(self):
        self.objects: dict[str, bytes] = {}

    async def has(self, name):
        return name in self.objects

    async def put(self, name, data): ...

    async def get(self, name):
        if name not in self.objects:
            raise HeadraceError("not there")
        return self.objects[name]

    def add(self, files, *, encoded=None):
        """Returns:  the card's digest."""
        encoded = encoded or msgspec.json.encode(make_card(FILES, model="m", block_size=16))
        if isinstance(encoded, dict):
            encoded = msgspec.json.encode(encoded | {"files": {name: sha256(data) for name, data in files.items()}})
        for data in (*files.values(), encoded):
            self.objects[sha256(data)] = data
        return sha256(encoded)


class Watched(Models):
    """Tells when every load has ended."""

    num_loading = 0

    async def load(self, worker):
        self.ended = asyncio.Event()
        self.num_loading += 1
        try:
            await super().load(worker)
        finally:
            self.num_loading -= 1
            self.ended.set()


class Stream:
    num_streams = num_bytes_received = num_bytes_sent = 0

    def __init__(self):
        self.closed = asyncio.get_running_loop().create_future()

    def close(self):
        if not self.closed.done():
            self.closed.set_result("closed")


class Patient(random.Random):
    """Nothing is tried twice within a test."""

    def uniform(self, a, b):
        return 1e6


class Gateway:
    """What stands between the planes and a request, with nothing but the planes faked."""

    def __init__(self, cache_dir):
        self.store, self.snapshot = Store(), Snapshot(BAD, 1, 1, b"")
        started = GatewaySettings()
        setup = routing_setup(started, RoutingConfig())
        self.now = 100.0
        self.router = Router(setup.settings, setup.policy, rng=random.Random(0))
        self.dispatcher = Dispatcher(self.router, clock=self.clock)
        self.models = Watched(self.store, cache_dir)
        self.fleet = WorkerConnections(
            self.router,
            self.dispatcher,
            self.models,
            self,
            connect=self.connect,
            clock=self.clock,
            rng=Patient(),
        )
        self.config = RoutingConfigFollower(started, setup, self.follow)
        self.directory = WorkerDirectory(
            Etcd("http://127.0.0.1:1"), "ns", on_up=self.fleet.worker_up, on_down=self.fleet.worker_down
        )
        plane = EventPlane("nats://127.0.0.1:1", "ns")
        self.kv_events = plane._decoded(KvEvents, self.fleet.kv_changed)
        self.load_reports = plane._decoded(LoadReport, self.fleet.load_reported)

    def clock(self):
        return self.now

    def follow(self, changed):
        self.router.configure(changed.settings, changed.policy, shadow=changed.shadow)
        self.dispatcher.changed()

    async def connect(self, worker):
        return Stream()

    async def request_snapshot(self, worker):
        return self.snapshot

    # --- what peers say ---------------------------------------------------------------------------------------------

    def registers(self, value, worker=BAD):
        self.directory._take_change(workers_prefix("ns") + worker.encode(), value)

    async def publishes(self, handler, payload):
        await handler(SimpleNamespace(data=payload))

    # --- what must hold ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self):
        self.registers(
            msgspec.json.encode(registration(GOOD, card_digest=self.store.add(FILES), model="ours")), worker=GOOD
        )
        self.task = asyncio.create_task(self.fleet.run())
        try:
            await self.settled()
            yield self
            await self.settled()
            await self.serves()
        finally:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self.dispatcher.stop()

    async def settled(self):
        for _ in range(8):
            await asyncio.sleep(0)
        while self.models.num_loading:
            await self.models.ended.wait()
            await asyncio.sleep(0)
        for _ in range(8):
            await asyncio.sleep(0)

    async def serves(self):
        assert not self.task.done()
        self.now += 1.0
        assert self.models.entry("ours").block_size == 16
        assert await self.route("ours") == GOOD
        assert await self.route(HOSTILE_MODEL) in {BAD, None}
        metrics = Metrics()
        metrics.watch(self.fleet.gauges)
        metrics.watch(self.config.gauges)
        metrics.watch(lambda: router_gauges(self.router.stats(now=self.now)))
        assert metrics.exposition()
        msgspec.json.encode([self.fleet.statuses(), self.models.statuses(), self.router.workers(now=self.now)])
        assert set(self.fleet._members) <= {GOOD, BAD}
        assert set(self.router._fleet.workers) <= {GOOD, BAD}
        assert set(self.router._fleet.index._copies) <= {GOOD, BAD}

    async def route(self, model):
        request = RoutableRequest(
            request=RequestId(f"r-{model}"),
            model=model,
            blocks=np.arange(1, 4, dtype=np.uint64),
            prompt_tokens=50,
            expected_tokens=10,
            deadline=self.now + 5.0,
        )
        answers = []
        try:
            self.dispatcher.submit(request, answers.append)
        except Rejected:
            return None
        for _ in range(8):
            await asyncio.sleep(0)
        if not answers:  # held until the worker has less to do
            self.dispatcher.withdraw(request.request)
            return None
        (answer,) = answers
        if isinstance(answer, Exception):
            assert not isinstance(answer, RouterBroken)
            return None
        self.dispatcher.release(request.request, Observed())
        return answer.decode


def against(act):
    """Run `act(gateway)` against a gateway that serves, and see that it still does."""

    async def run():
        with TemporaryDirectory() as cache:
            async with Gateway(Path(cache)).running() as gateway:
                result = act(gateway)
                if asyncio.iscoroutine(result):
                    await result

    with structlog.testing.capture_logs():
        asyncio.run(run())


hostile = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.integers(-2, 2),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.sampled_from([0, -1, 1e308, 2**31, 2**32, 2**48, 2**63 - 1, 2**64 - 1, 5e-324]),
)
words = st.one_of(st.text(max_size=20), st.sampled_from(["", "\x1b[2J", "a" * 300, "h:1", "..", "theirs", "bad"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words, st.binary(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=8,
)


def mutated(valid, changes=values):
    """A valid record of which some fields, those inside it too, are anything."""
    names = st.sampled_from(sorted(valid))

    def change(picked):
        changed = dict(valid)
        for name, value in picked.items():
            inner = valid[name]
            changed[name] = inner | {"x": 1, next(iter(inner), "1"): value} if isinstance(inner, dict) else value
        return changed

    return st.dictionaries(names, changes, min_size=1, max_size=3).map(change)


def encoded(encoder):
    """What encodes; the rest no peer could have sent."""

    def encode(value):
        try:
            return encoder(value)
        except (TypeError, OverflowError, ValueError, UnicodeEncodeError):
            return b"\xc1"

    return encode


json, msgpack = encoded(msgspec.json.encode), encoded(msgspec.msgpack.encode)
seconds = st.floats(0, 1e6)
counts = st.integers(0, 2**48)
positives = st.integers(1, 2**32)
facts = st.builds(
    EngineFacts,
    block_size=st.integers(1, 2**16),
    num_blocks=positives,
    context_length=positives,
    max_batch=positives,
    max_step_tokens=positives,
    bytes_per_block=counts,
    vocab_size=positives,
    is_shortest_first=st.booleans(),
    lacks=st.lists(st.sampled_from(["own_tokens", "thinking_budget", "", "of.newer:workers"]), max_size=3).map(tuple),
    latency=st.builds(
        LatencyPrior,
        **{name: seconds for name in LatencyPrior.__struct_fields__ if name != "handover_bytes_per_s"},
        handover_bytes_per_s=st.floats(1, 1e18),
    ),
)
registrations = st.builds(
    Registration,
    worker=st.just(BAD),
    epoch=st.integers(0, 2**63 - 1),
    role=st.sampled_from(Role),
    model=st.sampled_from([HOSTILE_MODEL, "ours "]),
    address=st.just("h:1"),
    engine=st.just("sim"),
    facts=facts,
    card_digest=st.just(sha256(msgspec.json.encode(make_card(FILES, model="m", block_size=16)))),
    handover=st.one_of(
        st.none(),
        st.builds(
            HandoverEndpoint, st.sampled_from(HandoverMode), st.text(max_size=9), st.text(max_size=9), st.just(9)
        ),
    ),
    state=st.sampled_from(WorkerState),
    is_pulling=st.booleans(),
    roles=st.lists(st.sampled_from(Role), max_size=3).map(tuple),
    becoming=st.none() | st.sampled_from(Role),
    layout=st.sampled_from(["", "a", "b"]),
)
steps = st.lists(st.builds(StepSample, counts, counts, counts, counts, seconds), max_size=9)
epochs = st.sampled_from([1, 2, 7, 2**63 - 1])
speakers = st.one_of(  # what a worker says of itself is believed
    st.tuples(st.sampled_from([BAD, WorkerId("stranger")]), epochs), st.tuples(st.just(GOOD), st.integers(2, 2**63 - 1))
)
reports = st.builds(
    lambda speaker, **load: LoadReport(*speaker, **load),
    speakers,
    state=st.just(WorkerState.READY),
    num_running=counts,
    num_waiting=counts,
    waiting_prefill_tokens=counts,
    free_blocks=counts,
    kv_tokens=counts,
    seq=st.integers(0, 2**63 - 1),
    num_cached=counts,
    digest=st.integers(0, 2**64 - 1),
    steps=steps,
)
hashes = st.integers(0, 20).flatmap(lambda count: st.binary(min_size=8 * count, max_size=8 * count))
batches = st.builds(
    KvEvents,
    worker=st.sampled_from([BAD, GOOD, WorkerId("stranger")]),
    epoch=epochs,
    seq=st.integers(0, 2**63 - 1),
    events=st.lists(
        st.one_of(st.builds(BlocksStored, hashes), st.builds(BlocksRemoved, hashes), st.builds(AllCleared)), max_size=4
    ),
)
VALID = msgspec.json.decode(msgspec.json.encode(registration(BAD, model=HOSTILE_MODEL)))
REPORT = msgspec.to_builtins(LoadReport(BAD, 1, WorkerState.READY, 1, 1, 1, 1, 1, 1, 1, 1))
BATCH = {"worker": "good", "epoch": 1, "seq": 1, "events": [["stored", bytes(8)]]}


def joins(gateway):
    gateway.registers(msgspec.json.encode(registration(BAD, model=HOSTILE_MODEL, card_digest=gateway.store.add(FILES))))


@hostile
@given(st.lists(st.one_of(st.binary(max_size=40), values.map(json), mutated(VALID).map(json)), min_size=1, max_size=3))
def test_any_bytes_for_a_registration(contents):
    def act(gateway):
        for content in contents:
            gateway.registers(content)

    against(act)


@hostile
@given(st.lists(registrations, min_size=1, max_size=4), st.lists(reports, max_size=3), st.lists(batches, max_size=3))
def test_any_valid_registration_and_what_that_worker_says(workers, said, published):
    async def act(gateway):
        for worker in workers:
            gateway.registers(msgspec.json.encode(worker))
            await gateway.settled()
            for report in said:
                mine = msgspec.structs.replace(report, worker=BAD, epoch=worker.epoch)
                await gateway.publishes(gateway.load_reports, msgspec.msgpack.encode(mine))
                gateway.now += 0.1
            for batch in published:
                mine = msgspec.structs.replace(batch, worker=BAD, epoch=worker.epoch)
                await gateway.publishes(gateway.kv_events, msgspec.msgpack.encode(mine))
            await gateway.settled()
            await gateway.serves()

    against(act)


@hostile
@given(st.lists(st.one_of(st.binary(max_size=40), mutated(REPORT).map(msgpack), reports.map(msgpack)), max_size=6))
def test_any_load_report(payloads):
    async def act(gateway):
        joins(gateway)
        await gateway.settled()
        for payload in payloads:
            await gateway.publishes(gateway.load_reports, payload)
            gateway.now += 0.1

    against(act)


@hostile
@given(
    st.lists(st.one_of(st.binary(max_size=40), mutated(BATCH).map(msgpack), batches.map(msgpack)), max_size=6),
    st.builds(Snapshot, st.sampled_from([GOOD, BAD]), epochs, st.integers(0, 2**63 - 1), hashes),
)
def test_any_kv_events_and_any_snapshot(payloads, snapshot):
    async def act(gateway):
        gateway.snapshot = snapshot
        joins(gateway)
        await gateway.settled()
        for payload in payloads:
            await gateway.publishes(gateway.kv_events, payload)
            await gateway.settled()

    against(act)


CARD = msgspec.to_builtins(make_card(FILES, model="m", block_size=16))
contents = {
    name: st.one_of(
        st.just(data),
        st.binary(max_size=60),
        values.map(json),
        mutated(msgspec.json.decode(data)).map(json) if name.endswith(".json") else st.just(b"{% if %}"),
    )
    for name, data in FILES.items()
}


@hostile
@given(
    st.fixed_dictionaries(contents),
    st.one_of(st.none(), st.just(CARD), mutated(CARD), values.map(json)),
    st.sampled_from([HOSTILE_MODEL, "\x7f", "theirs too"]),
)
def test_any_model_card(files, card, model):
    def act(gateway):
        digest = gateway.store.add(files, encoded=CARD if card is None else card)
        gateway.registers(msgspec.json.encode(registration(BAD, model=model, card_digest=digest)))

    against(act)


CONFIG = {
    "policy": "dynamo",
    "shadow_policy": "random",
    "queue_limit": 9,
    "slo_ttft_s": 1e9,
    "models": {"m": {"slo_ttft_s": 1e9, "slo_itl_s": 1e6}},
    "aging": 1.0,
    "promote_after_s": 1.0,
    "quantum_tokens": 9,
    "report_delay_s": 0.1,
    "history": 9,
}
POLICIES = st.sampled_from(["os:abort", "os:_exit", "random", "tests.fakes:FakeRouter", "no:such", ":", "mooncake"])


@hostile
@given(st.lists(st.one_of(st.binary(max_size=40), values.map(json), mutated(CONFIG, numbers | POLICIES).map(json))))
def test_any_routing_setting(contents):
    def act(gateway):
        for content in contents:
            gateway.config.take(content)
        # An SLO that nobody can meet is a setting like any other: it refuses what it says.
        settings = gateway.config.in_force.settings
        if any((slos.slo_ttft_s or 1e9) < 1e6 for slos in (settings, *settings.models.values())):
            gateway.config.take(None)

    against(act)


@pytest.mark.parametrize("kind", ["kv_events", "load_reports"])
def test_strangers_grow_no_table(kind):
    async def act(gateway):
        for number in range(200):
            stranger = WorkerId(f"stranger-{number}")
            if kind == "kv_events":
                message = KvEvents(stranger, number, 1, [BlocksStored(bytes(8))])
            else:
                message = LoadReport(stranger, number, WorkerState.READY, 1, 1, 1, 1, 1, 1, 1, 1)
            await gateway.publishes(getattr(gateway, kind), msgspec.msgpack.encode(message))

    against(act)
