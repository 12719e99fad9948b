"""Builds the gateway and runs it: every object once, every task in one TaskGroup."""

import asyncio
import contextlib
import functools
import gc
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import structlog
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.auth import ApiKeys, is_open_to_others
from app.console.live import Live
from app.console.routes import console_routes
from app.fleet.adapters import Adapters
from app.fleet.autorole import OFFICE, Autorole
from app.fleet.connections import WorkerConnections
from app.fleet.peers import PeerNews
from app.fleet.routing_config import RoutingConfig, RoutingConfigFollower, RoutingSetup, routing_setup
from app.gateway import Gateway, Tracer
from app.http.admin import admin_app
from app.http.body import BodyMemory
from app.http.cors import cross_origin
from app.http.leaving import Departure
from app.http.openapi import description_route
from app.http.origins import parse_origins
from app.http.response import Streamed
from app.http.routes.adapters import adapter_routes
from app.http.routes.completions import completion_routes
from app.http.routes.embeddings import embedding_route
from app.http.routes.messages import message_routes
from app.http.routes.operations import operation_routes
from app.http.routes.replies import error_reply
from app.http.routes.responses import response_routes
from app.http.routes.stored_responses import stored_response_routes
from app.http.routes.tokens import token_routes
from app.http.routes.usage import usage_routes
from app.http.server import HttpServer, listening, server_config
from app.keys.file import KeyFileError
from app.keys.ledger import KIND as BUDGETS
from app.keys.ledger import Ledger
from app.keys.record import KIND as KEYS
from app.keys.stored import StoredKeys
from app.keys.usage import KIND as USAGE
from app.keys.usage import UsageBook
from app.metrics import Metrics, router_gauges
from app.processes.answers import answer
from app.processes.siblings import Place, Siblings
from app.processes.start import serve_on_many
from app.prompt.catalog import Models
from app.prompt.prepare import Preprocessor
from app.recording import Recorder
from app.responses.background import Background
from app.responses.store import ResponseStore
from app.serving.binding import Clock, Dispatcher
from app.serving.prefill_queue import QueuedPrefills
from app.serving.relay import Relay
from app.serving.retries import ExchangeLimits
from app.settings import GatewaySettings
from planes.control import Etcd, WorkerDirectory, watch_config
from planes.election import Candidate
from planes.entries import ADAPTERS, Entries
from planes.events import EventPlane
from planes.keyed import KeyedStore
from planes.objects import ObjectStore
from planes.streams.client import WorkerConnection
from planes.streams.greeting import StreamKeys
from planes.wire.errors import HeadraceError, InvalidRequest, UnusableSetting
from planes.wire.messages import Adapter, Registration, RequestId
from planes.work_queue import PrefillQueue
from process.exposure import refuse_open_gateway
from process.logging import LineWriter, configure
from process.memory import share_one_heap
from router.roles import RoleGoals, RolePlanner
from router.router import Router

_log = structlog.get_logger()

_LAG_PERIOD_S = 0.5
_CONNECT_TIMEOUT_S = 3.0
_ID_BYTES, _IDS_DRAWN = 12, 256
_LEAST_RESPONSES = 16
"""As many responses as have room in the store, however long they are."""


def serve(settings: GatewaySettings) -> int:
    """Run a gateway until SIGINT or SIGTERM.

    Returns:  the exit status.  Raises:  UnusableSetting if it cannot start.
    """
    admin_host = None if settings.admin_port is None else settings.admin_host
    refuse_open_gateway(settings, settings.host, has_keys=settings.has_keys, admin_host=admin_host)
    if settings.processes > 1:
        return serve_on_many(settings, _serve_process)
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(listening("port", settings.host, settings.port))]
        if settings.admin_port is not None:
            sockets.append(held.enter_context(listening("admin_port", settings.admin_host, settings.admin_port)))
        _serve_process(settings, sockets)
    return 0


def _serve_process(
    settings: GatewaySettings,
    sockets: Sequence[socket.socket],
    place: Place | None = None,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """sockets: the port's, and the admin port's if there is one."""
    share_one_heap()
    always = {} if place is None else {"process": place.number}
    with LineWriter(sys.stderr) as lines, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        configure(settings.log_level, as_json=settings.log_json, lines=lines, always=always)
        runner.run(_run(settings, sockets, None if place is None else Siblings(place), begun))


def create_app(gateway: Gateway) -> Starlette:
    """The HTTP side of a gateway."""
    routes = [
        *completion_routes(gateway),
        *message_routes(gateway),
        *response_routes(gateway),
        *stored_response_routes(gateway),
        *token_routes(gateway),
        embedding_route(gateway),
        *operation_routes(gateway),
        *usage_routes(gateway),
        *adapter_routes(gateway),
    ]
    if gateway.live is not None:
        routes += console_routes(gateway, gateway.live)
    app = Starlette(
        routes=[description_route(routes, version=version("headrace")), *routes],
        exception_handlers={  # their type knows no more than that they take some exception
            HeadraceError: _refused,
            HTTPException: _no_route,  # type: ignore[dict-item]
            Exception: _refused,
        },
    )
    app.router.redirect_slashes = False
    return app


def streams_first(app: Starlette) -> ASGIApp:
    """`app` with its generating routes in front: the framework's layers would cost as much as routing and relaying.

    All stay among its routes, for other methods and for the schema.
    """
    streamed = streamed_routes(app)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        found = streamed.get(scope["path"]) if scope["method"] == "POST" else None
        await (found or app)(scope, receive, send)

    return serve


def streamed_routes(app: Starlette) -> dict[str, Streamed]:
    """Its generating routes, by path."""
    posts = [route for route in app.routes if isinstance(route, Route) and "POST" in (route.methods or ())]
    return {route.path: route.endpoint for route in posts if isinstance(route.endpoint, Streamed)}


def create_gateway(settings: GatewaySettings, events: EventPlane, siblings: Siblings | None = None) -> Gateway:
    """Everything but the connections to etcd and NATS. Call it with the event loop running.

    Raises:  UnusableSetting.
    """
    clock = time.monotonic  # the event loop's own counts whole milliseconds under uvloop
    metrics = Metrics()
    keys = StreamKeys(settings.stream_security)
    start = _routing(settings)
    router = Router(start.settings, start.policy, shadow=start.shadow, rng=random.Random())
    dispatcher = Dispatcher(router, clock=clock)

    def follow(changed: RoutingSetup) -> None:
        router.configure(changed.settings, changed.policy, shadow=changed.shadow)
        dispatcher.changed()

    routing_config = RoutingConfigFollower(settings, start, follow)
    known: dict[str, Adapter] = {}
    models = Models(ObjectStore(events), settings.assets_dir, adapters=known)

    async def connect(worker: Registration) -> WorkerConnection:
        where, limits = worker.address, settings.stream_limits
        return await WorkerConnection.open(
            worker.worker, worker.epoch, where, timeout_s=_CONNECT_TIMEOUT_S, limits=limits, keys=keys
        )

    fleet = WorkerConnections(router, dispatcher, models, events, connect=connect, clock=clock, rng=random.Random())
    peers = PeerNews(router, dispatcher, events, name=secrets.token_hex(8), clock=clock)
    live = None
    if settings.console:
        about: dict[str, Any] = {"version": version("headrace"), "namespace": settings.namespace}
        about["has_playground"] = settings.admin_port is None  # that port generates nothing
        live = Live(fleet, router, dispatcher, routing_config, clock=clock, wall_clock=time.time, about=about)
    prefills = None
    if settings.prefill_dispatch == "queue":
        prefills = QueuedPrefills(PrefillQueue(events), events, fleet, gateway=secrets.token_hex(8))
        metrics.watch(prefills.gauges)
    recorder = None
    if settings.record is not None:
        recorder = Recorder(
            settings.record.expanduser(),
            file_bytes=settings.record_file_bytes,
            num_files=settings.record_files,
            wall_clock=time.time,
            key=None if siblings is None else siblings.place.secret,
        )
        metrics.watch(recorder.gauges)
    tracer = _tracer(settings, clock)
    autorole = _autorole(settings, router, fleet, clock) if settings.autorole else None
    if autorole is not None:
        metrics.watch(autorole.gauges)
    relay = Relay(
        dispatcher,
        fleet,
        metrics,
        clock=clock,
        limits=ExchangeLimits(settings.max_attempts, settings.replacement_s),
        prefills=prefills,
        keepalive_s=settings.sse_keepalive_s,
        recorder=recorder,
        tracer=tracer,
    )
    values = KeyedStore(
        events,
        "responses",
        ttl_s=settings.response_ttl_s,
        max_bytes=settings.response_store_bytes,
        max_value_bytes=max(1, settings.response_store_bytes // _LEAST_RESPONSES),
    )
    responses = ResponseStore(values)
    background = Background(responses, events, relay, gateway=secrets.token_hex(8), clock=clock)
    budgets = Entries(Etcd(settings.etcd, security=settings.etcd_security), settings.namespace, BUDGETS)
    ledger = Ledger(budgets, gateway=secrets.token_hex(8), wall_clock=time.time, clock=clock)
    used = Entries(Etcd(settings.etcd, security=settings.etcd_security), settings.namespace, USAGE)
    usage = UsageBook(used, gateway=secrets.token_hex(8), wall_clock=time.time)
    wanted = Entries(Etcd(settings.etcd, security=settings.etcd_security), settings.namespace, ADAPTERS)
    adapters = Adapters(
        wanted, known, models, new_number=lambda: 1 + secrets.randbelow((1 << 31) - 1), wall_clock=time.time
    )
    metrics.watch(ledger.gauges)
    metrics.watch(usage.gauges)
    metrics.watch(fleet.gauges)
    metrics.watch(peers.gauges)
    metrics.watch(routing_config.gauges)
    metrics.watch(lambda: router_gauges(router.stats(now=clock())))
    return Gateway(
        settings=settings,
        keys=_keys(settings),
        ledger=ledger,
        usage=usage,
        models=models,
        preprocessor=Preprocessor(keeps_nonces=settings.keep_prompt_nonces, clock=clock),
        bodies=BodyMemory(settings.body_memory_bytes),
        router=router,
        routing_config=routing_config,
        dispatcher=dispatcher,
        fleet=fleet,
        peers=peers,
        relay=relay,
        adapters=adapters,
        prefills=prefills,
        recorder=recorder,
        tracer=tracer,
        live=live,
        autorole=autorole,
        departure=Departure(settings.drain_delay_s, call_later=asyncio.get_running_loop().call_later),
        responses=responses,
        background=background,
        metrics=metrics,
        clock=clock,
        wall_clock=time.time,
        new_request_id=request_ids().__next__,
        siblings=siblings,
    )


def request_ids() -> Iterator[RequestId]:
    """Names of 96 random bits, drawn many at a time: each draw is a system call."""
    while True:
        drawn = secrets.token_hex(_ID_BYTES * _IDS_DRAWN)
        for at in range(0, len(drawn), 2 * _ID_BYTES):
            yield RequestId(drawn[at : at + 2 * _ID_BYTES])


async def _run(
    settings: GatewaySettings, sockets: Sequence[socket.socket], siblings: Siblings | None, begun: Callable[[], None]
) -> None:
    listener, admin_listener = sockets[0], sockets[1] if len(sockets) > 1 else None
    events = EventPlane(settings.nats, settings.namespace, security=settings.nats_security, name="gateway")
    gateway = create_gateway(settings, events, siblings)
    fleet = gateway.fleet
    await events.subscribe_kv(fleet.kv_changed)
    await events.subscribe_load(fleet.load_reported)
    await events.subscribe_news(gateway.peers.told)
    app = create_app(gateway)
    origins = parse_origins(settings.cors_origin)
    serving = cross_origin(streams_first(app), origins)
    # Answers to other origins' pages begin with what `cross_origin` adds.
    at_once = {} if origins else {path: route.begin for path, route in streamed_routes(app).items()}
    server = HttpServer(server_config(settings, serving, gateway.metrics, at_once=at_once), gateway.live)
    admin = HttpServer(server_config(settings, admin_app(app), gateway.metrics))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, gateway.departure.signalled, server.stop)
    if gateway.keys.path is None:  # no keys to read anew: it is the terminal's farewell
        loop.add_signal_handler(signal.SIGHUP, gateway.departure.signalled, server.stop)
    else:
        loop.add_signal_handler(signal.SIGHUP, _reload_keys, gateway.keys)
    try:
        async with asyncio.TaskGroup() as tasks:
            forever = [tasks.create_task(work) for work in _lasting(settings, gateway, events)]
            background = tasks.create_task(gateway.background.run())
            host, port = listener.getsockname()[:2]
            if fallback := gateway.router.stats(now=gateway.clock()).index_fallback:
                _log.warning("index.pure_python", reason=fallback)
            _settle_memory()
            _log_start(settings, host, port)
            begun()
            operators = tasks.create_task(_serve_operators(admin, admin_listener))
            await server.serve(sockets=[listener])
            await server.cut_off()
            await gateway.background.stop(server.left_s())
            await background
            for task in forever:
                task.cancel()
            await gateway.ledger.stop()
            await gateway.usage.stop()
            admin.stop()
            admin.force_exit = server.force_exit
            await operators
    finally:
        gateway.dispatcher.stop()
        gateway.preprocessor.close()
        if gateway.tracer is not None:
            await asyncio.to_thread(gateway.tracer.close)
    _log.info("gateway.stopped")


def _lasting(settings: GatewaySettings, gateway: Gateway, events: EventPlane) -> list[Coroutine[Any, Any, None]]:
    """What a gateway does for as long as it serves."""
    fleet, etcd = gateway.fleet, Etcd(settings.etcd, security=settings.etcd_security)
    directory = WorkerDirectory(etcd, settings.namespace, on_up=fleet.worker_up, on_down=fleet.worker_down)
    lasting = [
        events.run(),
        directory.run(),
        watch_config(etcd, settings.namespace, gateway.routing_config.take),
        fleet.run(),
        gateway.peers.run(),
        gateway.adapters.run(),
        _watch_loop(gateway.metrics, gateway.clock),
    ]
    if (stored := gateway.keys.stored) is not None:
        lasting.append(Entries(etcd, settings.namespace, KEYS).watch(stored.take, stored.listed))
    if not gateway.keys.is_open:
        lasting += [gateway.ledger.run(), gateway.usage.run()]
    lasting += [each.run() for each in (gateway.prefills, gateway.recorder, gateway.autorole) if each is not None]
    if gateway.siblings is not None:
        lasting.append(gateway.siblings.run(functools.partial(answer, gateway)))
    return lasting


async def _serve_operators(server: HttpServer, listener: socket.socket | None) -> None:
    if listener is not None:
        _log.info("gateway.admin_listening", at=listener.getsockname()[1])
        await server.serve(sockets=[listener])


def _log_start(settings: GatewaySettings, host: str, port: int) -> None:
    if is_open_to_others(settings.host, settings.api_keys_file, has_stored_keys=settings.api_keys):
        _log.warning("gateway.open_to_all", host=host, advice="set --api-keys or listen on 127.0.0.1")
    _log.info("gateway.listening", host=host, port=port, policy=settings.policy, tls=settings.tls_cert is not None)


def _settle_memory() -> None:
    """What is there now stays: the garbage collector need not walk it again and again, with all requests waiting."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def _watch_loop(metrics: Metrics, clock: Clock) -> None:
    while True:
        due = clock() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        metrics.loop_lagged(max(0.0, clock() - due))


def _routing(settings: GatewaySettings) -> RoutingSetup:
    try:
        return routing_setup(settings, RoutingConfig())
    except ValueError as exc:
        raise UnusableSetting("policy", settings.policy, str(exc)) from exc


def _tracer(settings: GatewaySettings, clock: Clock) -> Tracer | None:
    if settings.otlp_endpoint is None:
        return None
    try:
        from app.telemetry.tracing import otlp_tracing  # noqa: PLC0415 - an extra, and nobody else should pay for it
    except ImportError as exc:
        why = f"it needs OpenTelemetry ({exc}): pip install -e '.[otel]' in a checkout"
        raise UnusableSetting("otlp_endpoint", settings.otlp_endpoint, why) from exc
    return otlp_tracing(
        settings.otlp_endpoint,
        version=version("headrace"),
        ratio=settings.trace_ratio,
        clock=clock,
        wall_clock=time.time,
        rng=random.Random(),
    )


def _autorole(settings: GatewaySettings, router: Router, fleet: WorkerConnections, clock: Clock) -> Autorole:
    goals = RoleGoals(
        window_s=settings.autorole_window_s,
        horizon_s=settings.autorole_horizon_s,
        min_prefill=settings.autorole_min_prefill,
        min_decode=settings.autorole_min_decode,
    )
    name = secrets.token_hex(8)
    return Autorole(
        RolePlanner(goals),
        Candidate(Etcd(settings.etcd, security=settings.etcd_security), settings.namespace, OFFICE, name, clock=clock),
        router,
        fleet.registrations,
        namespace=settings.namespace,
        gateway=name,
        clock=clock,
        wall_clock=time.time,
    )


def _keys(settings: GatewaySettings) -> ApiKeys:
    try:
        return ApiKeys(settings.api_keys_file, stored=StoredKeys() if settings.api_keys else None)
    except KeyFileError as exc:
        raise UnusableSetting("api_keys_file", str(settings.api_keys_file), str(exc)) from exc


def _reload_keys(keys: ApiKeys) -> None:
    try:
        keys.reload()
    except KeyFileError as exc:
        _log.warning("keys.refused", reason=str(exc))
    else:
        _log.info("keys.reloaded")


async def _refused(_: Request, exc: Exception) -> Response:
    return error_reply(exc)


async def _no_route(request: Request, exc: HTTPException) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "invalid_request")
    reply = error_reply(InvalidRequest(f"{request.method} {request.url.path[:200]}: {exc.detail}", code=code))
    if exc.status_code == 405:  # of all routes of this path: one alone knows its own methods only
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        reply.headers["allow"] = ", ".join(sorted({method for route in routes for method in route.methods}))
    return reply
