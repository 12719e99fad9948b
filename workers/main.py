"""One worker's life.

| stage    | what happens                                              | ends with                                    |
|----------|-----------------------------------------------------------|----------------------------------------------|
| starting | tokenizer, engine, stream server, card, registration      | `worker.ready`, or exit status 2             |
| ready    | requests; changes of role (`role.py`)                     | SIGTERM or SIGINT; the engine's death        |
| draining | registered as draining; running requests go on            | the last of them, or `drain_s`               |
| stopping | the rest is interrupted, deregistered, everything closed  | exit status 0, or 1 if the engine died       |

etcd and NATS may be out of reach at any time: at the start the worker waits for them, later it goes on without them.
"""

import asyncio
import contextlib
import gc
import os
import socket
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec
import structlog

from planes.control import ControlPlaneUnavailable, Etcd, Registrar, WorkerIdTaken, check_id_is_free
from planes.entries import ADAPTERS, Entries
from planes.events import EventPlane
from planes.objects import ObjectStore
from planes.role_wishes import watch_role_wishes
from planes.security.files import Reloaded, read_secret
from planes.security.tls import http_tls
from planes.streams.client import greets
from planes.streams.greeting import StreamKeys
from planes.streams.protocol import StreamLimits
from planes.streams.server import StreamServer
from planes.wire.errors import UnusableSetting
from planes.wire.messages import Registration, WorkerId
from planes.work_queue import PrefillQueue
from process.exposure import refuse_open_worker
from workers.adapters import AdapterKeeper
from workers.answer.detokenizer import Vocabulary, load_vocabulary
from workers.engine.base import Engine, EngineStartError
from workers.engine.make import make_engine
from workers.kv_events import Publisher
from workers.metrics import WorkerMetrics
from workers.metrics_port import MetricsPort
from workers.model_card import CardPublisher, read_card, read_parser_names
from workers.parsers import NO_PARSERS, ParserNames, engine_reasoning, make_parsers
from workers.prefill_queue import Puller
from workers.rendering import rendering_of
from workers.role import RoleKeeper
from workers.server import WorkerServer
from workers.settings import WorkerSettings

_log = structlog.get_logger()

_LAST_NEWS_S = 2.0
"""How long the outcome of jobs from the queue may take to reach NATS at the end."""
_CARD_PATIENCE_S = 10.0
"""Gateways may have this model's card from another worker: without NATS, register all the same after so long."""


class Ending:
    """Why the process should end; the first reason counts."""

    def __init__(self) -> None:
        self._has_come = asyncio.Event()
        self.death: str | None = None
        """Why the engine died; None if it did not."""
        self.refusal: WorkerIdTaken | None = None
        """Why the fleet has no place for this worker; None if it has."""

    def engine_died(self, reason: str) -> None:
        if not self._has_come.is_set():
            self.death = reason
        self._has_come.set()

    def refused(self, refusal: WorkerIdTaken) -> None:
        if not self._has_come.is_set():
            self.refusal = refusal
        self._has_come.set()

    def asked(self) -> None:
        self._has_come.set()

    async def wait(self) -> None:
        await self._has_come.wait()

    async def run_until_ending(self, work: Coroutine[Any, Any, object]) -> bool:
        """Await `work`; cancel it if the end comes first. Tells whether it was done. What it raises is passed on."""
        working = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            return working.done()
        finally:
            working.cancel()
            waiting.cancel()
            await asyncio.gather(working, waiting, return_exceptions=True)


class EngineFactory(Protocol):
    """What `workers.engine.make.make_engine` is."""

    def __call__(
        self, settings: WorkerSettings, worker: WorkerId, *, vocab_size: int, reasoning_parser: str = ""
    ) -> Engine: ...


async def serve(settings: WorkerSettings, ending: Ending, *, make_engine: EngineFactory = make_engine) -> int:
    """Run a worker until `ending` is asked for, or its engine dies.

    Returns:  the exit status.  Raises:  HeadraceError if it cannot start.
    """
    started_at = time.monotonic()
    worker = WorkerId(settings.new_worker_id())
    if cores := settings.core_numbers():
        _take_cores(settings, cores)
    refuse_open_worker(settings, settings.host)
    _refuse_taken_port(settings)
    keys = StreamKeys(settings.stream_security)
    is_running = partial(greets, keys=keys)
    etcd = Etcd(settings.etcd, security=settings.etcd_security)
    with contextlib.suppress(ControlPlaneUnavailable):  # it will be asked again
        await check_id_is_free(etcd, settings.namespace, worker, is_running=is_running)
    vocabulary = await asyncio.to_thread(load_vocabulary, settings.model_path / "tokenizer.json")
    epoch = time.time_ns()
    names = NO_PARSERS
    if not settings.is_embedding:
        names = await asyncio.to_thread(
            read_parser_names,
            settings.model_path,
            settings.tool_parser,
            settings.reasoning_parser,
            engine=settings.engine,
        )
    engine = make_engine(
        settings,
        worker,
        vocab_size=len(vocabulary.names),
        reasoning_parser=engine_reasoning(names, vocabulary),
    )
    plane = EventPlane(settings.nats, settings.namespace, security=settings.nats_security, name=worker)
    publisher = Publisher(worker, epoch, plane, load=engine.load, on_death=ending.engine_died)
    try:
        if await ending.run_until_ending(engine.start(publisher, progress=progressed)):
            gc.collect()
            gc.freeze()  # what the start has left stays; collections need not look at it again
            running = _Worker(settings, worker, epoch, engine, plane, publisher, ending, names, etcd, keys)
            await running.run(vocabulary, started_at)
    finally:
        await engine.stop()
    if ending.refusal is not None:
        raise ending.refusal
    if ending.death is not None:
        _log.error("worker.failed", worker=worker, reason=ending.death)
        return 1
    _log.info("worker.stopped", worker=worker)
    return 0


@dataclass(frozen=True, slots=True)
class _Worker:
    """A worker whose engine runs."""

    settings: WorkerSettings
    worker: WorkerId
    epoch: int
    engine: Engine
    plane: EventPlane
    publisher: Publisher
    ending: Ending
    parsers: ParserNames
    etcd: Etcd
    keys: StreamKeys

    async def run(self, vocabulary: Vocabulary, started_at: float) -> None:
        settings, facts = self.settings, self.engine.facts
        card = await read_card(
            settings.model_path,
            model=settings.model_name,
            block_size=facts.block_size,
            parsers=self.parsers,
            embedding_size=facts.embedding_size,
            is_matryoshka=facts.is_matryoshka,
            matryoshka_dimensions=facts.matryoshka_dimensions,
        )
        cards = CardPublisher(settings.model_path, card, ObjectStore(self.plane), self.plane)
        server = WorkerServer(
            self.engine,
            role=settings.worker_role,
            vocabulary=vocabulary.covering(facts.vocab_size),
            end_tokens=frozenset(card.eos_token_ids),
            max_queued=settings.max_queued,
            call_later=asyncio.get_running_loop().call_later,
            parsers=await asyncio.to_thread(
                make_parsers, self.parsers, vocabulary, settings.model_path, engine=settings.engine
            ),
        )
        metrics = await self._watched(server)
        limits = StreamLimits(ping_s=settings.heartbeat_s, dead_s=settings.dead_after_s)
        streams = StreamServer(server, worker=self.worker, epoch=self.epoch, limits=limits, keys=self.keys)
        rendering = await asyncio.to_thread(rendering_of, settings.model_path, settings.engine)
        registration = self._registration(await self._listen(streams), cards.digest, rendering)
        is_running = partial(greets, keys=self.keys)
        registrar = Registrar(self.etcd, settings.namespace, registration, is_running=is_running)
        puller = self._puller(server) if settings.may_pull else None
        keeper = RoleKeeper(registration, server, registrar, puller)
        adapters = AdapterKeeper(settings.model_name, self.engine, server, keeper.loaded)
        async with asyncio.TaskGroup() as group:
            # The publisher first: it subscribes before there is a connection that could fail it.
            tasks = [group.create_task(work) for work in (self.publisher.run(), cards.run(), self.plane.run())]
            await self.ending.run_until_ending(self._card_stored(cards))
            tasks.append(group.create_task(self._register(registrar)))
            if await self.ending.run_until_ending(registrar.registered.wait()):
                seconds = round(time.monotonic() - started_at, 1)
                _log.info("worker.ready", worker=self.worker, address=registration.address, seconds=seconds)
            if puller is not None:
                tasks.append(group.create_task(puller.run()))
            lasting = (keeper.run(), self._hear_wishes(keeper), adapters.run(), self._hear_adapters(adapters))
            following = [group.create_task(work) for work in lasting]
            await self.ending.wait()
            for task in following:
                task.cancel()
            if puller is not None:
                puller.stop()
            await self._drain(server, keeper)
            if puller is not None:
                await puller.until_idle(_LAST_NEWS_S)
            await registrar.close()
            await streams.stop()
            if metrics is not None:
                metrics.close()
            server.hear_no_more()
            _log.info(
                "worker.counted",
                worker=self.worker,
                prompt_tokens=server.prompt_tokens,
                completion_tokens=server.completion_tokens,
            )
            for task in tasks:
                task.cancel()

    async def _watched(self, server: WorkerServer) -> MetricsPort | None:
        """Let others look on, where that is wanted.  Raises:  UnusableSetting."""
        settings = self.settings
        if settings.metrics_port is None:
            return None
        server.tally = metrics = WorkerMetrics(
            self.worker,
            settings.model_name,
            num_blocks=self.engine.facts.num_blocks,
            load=self.engine.load,
            role=lambda: server.role,
        )
        cert, key, token = settings.plane_cert, settings.plane_key, settings.metrics_token_file
        listener = MetricsPort(
            metrics.exposition,
            tls=None if cert is None or key is None else http_tls(cert, key),
            token=None if token is None else Reloaded((token,), partial(read_secret, token)),
            is_open=settings.has_open_metrics,
        )
        port = await listener.listen(settings.host, settings.metrics_port)
        _log.info("metrics.listening", host=settings.host, port=port)
        return listener

    async def _register(self, registrar: Registrar) -> None:
        try:
            await registrar.run()
        except WorkerIdTaken as exc:
            self.ending.refused(exc)

    async def _hear_wishes(self, keeper: RoleKeeper) -> None:
        await watch_role_wishes(self.etcd, self.settings.namespace, keeper.wished, worker=self.worker)

    async def _hear_adapters(self, adapters: AdapterKeeper) -> None:
        await Entries(self.etcd, self.settings.namespace, ADAPTERS).watch(adapters.take, lambda: None)

    async def _listen(self, streams: StreamServer) -> str:
        """Returns:  the address to register."""
        settings = self.settings
        try:
            port = await streams.listen(settings.host, settings.port)
        except OSError as exc:
            raise UnusableSetting(
                "port", settings.port, f"{settings.host} cannot listen there: {exc.strerror}"
            ) from exc
        host = settings.public_host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _puller(self, server: WorkerServer) -> Puller:
        settings = self.settings
        return Puller(
            self.worker,
            settings.model_name,
            PrefillQueue(self.plane),
            self.plane,
            server,
            self.engine,
            pull_ahead=settings.pull_ahead,
        )

    def _registration(self, address: str, card_digest: str, rendering: str) -> Registration:
        registration = Registration(
            worker=self.worker,
            epoch=self.epoch,
            role=self.settings.worker_role,
            model=self.settings.model_name,
            address=address,
            engine=self.settings.engine,
            facts=self.engine.facts,
            card_digest=card_digest,
            handover=self.engine.endpoint,
            is_pulling=self.settings.is_pulling,
            layout=self.engine.layout,
            rendering=rendering,
            roles=self.engine.roles,
        )
        return _checked(registration)

    async def _card_stored(self, cards: CardPublisher) -> None:
        """No gateway can use a worker whose card is nowhere; while NATS is away, some may have it from another one."""
        while not cards.published.is_set():
            await _at_most(_CARD_PATIENCE_S, cards.published)
            if not self.plane.is_connected:
                return

    async def _drain(self, server: WorkerServer, keeper: RoleKeeper) -> None:
        """Let running requests end, unless the engine is dead, or dies now."""
        server.drain()
        self.publisher.drain()
        keeper.drain()
        if self.ending.death is None and server.num_requests:
            _log.info("worker.draining", worker=self.worker, requests=server.num_requests)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.drain_s):
                    await server.until_idle()
        if self.ending.death is not None:
            server.interrupt_all("engine_died", "the engine of this worker died; its log says why")
        else:
            server.interrupt_all("worker_stopping", f"not finished within the {self.settings.drain_s:g} s for draining")


def progressed(step: str) -> None:
    """One line about a start that takes long; `headrace up` shows it."""
    _log.info("worker.progress", step=step)


def _checked(registration: Registration) -> Registration:
    """Raises:  EngineStartError for one that every gateway would pass over."""
    try:
        return msgspec.json.decode(msgspec.json.encode(registration), type=Registration)
    except msgspec.ValidationError as exc:
        raise EngineStartError(f"no gateway would take this worker, registered as {registration}: {exc}") from exc


async def _at_most(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _take_cores(settings: WorkerSettings, cores: tuple[int, ...]) -> None:
    """Keep to these cores, engine included: a prefill must not stall a decode beside it."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError as exc:
        there = sorted(os.sched_getaffinity(0))
        raise UnusableSetting("cores", settings.cores, f"this process may use {there}") from exc


def _refuse_taken_port(settings: WorkerSettings) -> None:
    """Before the engine takes its time. Raises:  UnusableSetting."""
    try:
        with socket.create_server((settings.host, settings.port), family=_family(settings.host)):
            pass
    except OSError as exc:
        raise UnusableSetting("port", settings.port, f"{settings.host} cannot listen there: {exc.strerror}") from exc


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
