"""A gateway with as many workers as one likes, none of them real: what the console shows of a large fleet.

python -m tests.console.fake_gateway --port 8123 --workers 200
"""

import argparse
import asyncio
import dataclasses
import random
import tempfile
import time
from pathlib import Path

import msgspec
import uvicorn

from app.auth import ApiKeys
from app.console.live import Live
from app.fleet.adapters import Adapters
from app.fleet.connections import WorkerConnections
from app.fleet.peers import PeerNews
from app.fleet.routing_config import RoutingConfig, RoutingConfigFollower, routing_setup
from app.gateway import Gateway
from app.http.body import BodyMemory
from app.http.leaving import Departure
from app.http.server import server_config
from app.keys.ledger import Ledger
from app.keys.usage import UsageBook
from app.main import create_app, streams_first
from app.metrics import Metrics
from app.prompt.catalog import Models
from app.prompt.prepare import Preprocessor
from app.responses.background import Background
from app.responses.store import ResponseStore
from app.serving.binding import Dispatcher
from app.serving.relay import Relay
from app.serving.retries import ExchangeLimits
from app.settings import GatewaySettings
from planes.wire.messages import LoadReport, RequestId, Role, StepSample, WorkerId, WorkerState
from router.request import Explanation
from router.router import Router
from router.timeline import Stage, StageKind, Timeline
from tests.fakes import FakeEntries, FakeNewsPlane, FakeValues, registration

NAMES = ("llama-3.1-70b", "qwen3-8b")


class NoStore:
    """Has no files, and needs none."""

    async def has(self, name):
        return False

    async def put(self, name, data): ...

    async def get(self, name):
        raise FileNotFoundError(name)

    async def request_snapshot(self, worker):
        await asyncio.Event().wait()


class Still:
    """A connection that nothing happens on."""

    num_bytes_received = num_bytes_sent = 0

    def __init__(self, num_streams):
        self.num_streams = num_streams
        self.closed = asyncio.get_running_loop().create_future()

    def close(self): ...


async def load(worker): ...


async def connect(worker):
    if worker.worker.endswith("13"):
        await asyncio.Event().wait()
    return Still(random.randrange(8))


def make_gateway(folder: Path, keys: ApiKeys | None = None, *, has_playground: bool = True) -> Gateway:
    """All of one, with nothing around it."""
    settings = GatewaySettings(cache_dir=folder, slo_ttft_s=2.0, slo_itl_ms=50.0)
    clock = time.monotonic
    start = routing_setup(settings, RoutingConfig())
    router, metrics = Router(start.settings, start.policy), Metrics()
    dispatcher, models = Dispatcher(router, clock=clock), Models(NoStore(), folder)
    models.load = load
    fleet = WorkerConnections(router, dispatcher, models, NoStore(), connect=connect, clock=clock, rng=random.Random(0))
    relay = Relay(dispatcher, fleet, metrics, clock=clock, limits=ExchangeLimits(replacement_s=0.0))
    responses = ResponseStore(FakeValues())
    routing = RoutingConfigFollower(settings, start, lambda changed: None)
    about = {"version": "0.0.0", "namespace": "fake", "has_playground": has_playground}
    return Gateway(
        settings=settings,
        keys=keys or ApiKeys(),
        ledger=Ledger(FakeEntries(), gateway="g", wall_clock=time.time),
        usage=UsageBook(FakeEntries(), gateway="g", wall_clock=time.time),
        models=models,
        preprocessor=Preprocessor(),
        bodies=BodyMemory(1 << 20),
        router=router,
        routing_config=routing,
        dispatcher=dispatcher,
        fleet=fleet,
        peers=PeerNews(router, dispatcher, FakeNewsPlane(), name="0" * 16, clock=clock),
        relay=relay,
        responses=responses,
        background=Background(responses, models, relay, gateway="g"),
        adapters=Adapters(FakeEntries(), {}, models, new_number=lambda: 1, wall_clock=time.time),
        departure=Departure(0.0, call_later=asyncio.get_running_loop().call_later),
        metrics=metrics,
        clock=clock,
        wall_clock=time.time,
        new_request_id=lambda: RequestId(random.randbytes(12).hex()),
        live=Live(fleet, router, dispatcher, routing, clock=clock, wall_clock=time.time, about=about),
    )


class FakeFleet:
    """Registers workers, and says what they would."""

    def __init__(self, gateway: Gateway, num_workers: int) -> None:
        self._gateway = gateway
        self._rng = random.Random(7)
        self._workers = [self._registration(number) for number in range(num_workers)]

    def _registration(self, number: int):
        role = (Role.PREFILL, Role.DECODE, Role.DECODE, Role.BOTH)[number % 4]
        kind = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "both"}[role]
        state = WorkerState.DRAINING if number % 41 == 40 else WorkerState.READY
        model = NAMES[number % 10 == 9] if number > 10 else NAMES[0]
        epoch = int((time.time() - 7000 - 60 * number) * 1e9)
        made = registration(f"{kind}-{number}", role, epoch=epoch, state=state, model=model)
        facts = msgspec.structs.replace(made.facts, num_blocks=20_000, bytes_per_block=1 << 20, max_batch=64)
        becoming = Role.DECODE if number % 67 == 35 else None
        return msgspec.structs.replace(made, facts=facts, layout="8f31c0de5a77", becoming=becoming)

    def register(self) -> None:
        for worker in self._workers:
            self._gateway.fleet.worker_up(worker)

    async def run(self) -> None:
        """Two reports of each worker a second, and requests that end."""
        beat = 0
        while True:
            for number, worker in enumerate(self._workers):
                if number % 10 == beat % 10:
                    self._gateway.fleet.load_reported(self._report(worker))
            for _ in range(max(1, len(self._workers) // 20)):
                self.end_request(ago_s=0.0)
            beat += 1
            await asyncio.sleep(0.05)

    def _report(self, worker) -> LoadReport:
        rng = self._rng
        busy = rng.uniform(0.2, 0.95)
        running = int(busy * 48) if worker.role is not Role.PREFILL else int(busy * 4)
        steps = [StepSample(0, 0, running, running * 900, 0.025) for _ in range(20)]
        if worker.role is not Role.DECODE:
            steps = [StepSample(rng.randrange(1500, 2048), 1 << 20, running, running * 900, 0.11) for _ in range(4)]
        return LoadReport(
            worker=worker.worker,
            epoch=worker.epoch,
            state=worker.state,
            num_running=running,
            num_waiting=rng.randrange(6) if busy > 0.7 else 0,
            waiting_prefill_tokens=rng.randrange(9000) if busy > 0.6 else 0,
            free_blocks=int(20_000 * (1 - busy)),
            kv_tokens=running * 900,
            seq=0,
            num_cached=int(20_000 * min(1.0, busy + 0.2)),
            digest=0,
            steps=steps,
        )

    def end_request(self, *, ago_s: float) -> None:
        """One more has ended, `ago_s` ago."""
        rng, gateway = self._rng, self._gateway
        prefill = rng.choice([worker for worker in self._workers if worker.role is not Role.DECODE])
        takers = [w for w in self._workers if w.role is not Role.PREFILL and w.model == prefill.model]
        decode = prefill if prefill.role is Role.BOTH and rng.random() < 0.5 else rng.choice(takers)
        request = gateway.new_request_id()
        prompt, answer = rng.randrange(200, 8000), rng.randrange(20, 400)
        cached = int(prompt * rng.choice((0, 0, 0.4, 0.8)))
        queue, wait, compute = (
            rng.expovariate(30),
            rng.expovariate(20),
            0.02 + (prompt - cached) * rng.uniform(1, 2) / 9e3,
        )
        moved = 0.0 if decode is prefill else 0.004 + prompt / 9e5
        decoded = answer * rng.uniform(0.018, 0.034)
        marks, at = [], 0.0
        for kind, seconds in (
            (StageKind.PREPARE, 0.002),
            (StageKind.QUEUE, queue),
            (StageKind.WAIT, wait),
            (StageKind.PREFILL, compute),
            (StageKind.HANDOVER, moved),
            (StageKind.DECODE, decoded),
        ):
            if seconds:
                place = {StageKind.PREFILL: prefill.worker, StageKind.DECODE: decode.worker}.get(kind)
                stage = Stage(kind, 1, at, at + seconds, worker=place)
                if kind is StageKind.HANDOVER:
                    stage = msgspec.structs.replace(
                        stage, worker=decode.worker, source=prefill.worker, num_bytes=prompt * 65_536
                    )
                marks.append(stage)
                at += seconds
        timeline = Timeline(
            request=request,
            model=prefill.model,
            received_at=gateway.clock() - at - ago_s,
            end_s=at,
            code="ok" if rng.random() > 0.004 else "worker_lost",
            policy="headrace",
            prefill=WorkerId(prefill.worker),
            decode=WorkerId(decode.worker),
            prompt_tokens=prompt,
            completion_tokens=answer,
            cached_tokens=cached,
            ttft_s=0.002 + queue + wait + compute,
            itl_s=decoded / answer,
            stages=tuple(marks),
        )
        explanation = Explanation(request, "headrace", prompt, timeline.received_at)
        gateway.router._history.add(explanation)
        gateway.dispatcher.ended(request, lambda: timeline)


async def serve(port: int, num_workers: int, admin_key: str, *, has_playground: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = _keys(Path(folder) / "keys.toml", admin_key) if admin_key else None
        gateway = make_gateway(Path(folder), keys, has_playground=has_playground)
        fleet = FakeFleet(gateway, num_workers)
        fleet.register()
        server = uvicorn.Server(_config(gateway, port))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(gateway.fleet.run())
            tasks.create_task(fleet.run())
            await server.serve()


def _keys(path: Path, admin_key: str) -> ApiKeys:
    path.write_text(f'[[keys]]\ntenant = "operator"\nkey = "{admin_key}"\nadmin = true\n')
    return ApiKeys(path)


def _config(gateway: Gateway, port: int) -> uvicorn.Config:
    settings = dataclasses.replace(gateway.settings, drain_s=1.0)
    config = server_config(settings, streams_first(create_app(gateway)), gateway.metrics)
    config.host, config.port = "127.0.0.1", port
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--admin-key", default="", help="ask for this key; without it everybody may look")
    parser.add_argument("--no-playground", action="store_true", help="as a port for operators has none")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.workers, args.admin_key, has_playground=not args.no_playground))
