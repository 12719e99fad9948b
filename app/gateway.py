"""What one gateway process is made of; built once, in `main.py`, and handed to whoever needs a part of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from app.auth import ApiKeys
from app.console.live import Live
from app.fleet.adapters import Adapters
from app.fleet.autorole import Autorole
from app.fleet.connections import WorkerConnections
from app.fleet.peers import PeerNews
from app.fleet.routing_config import RoutingConfigFollower
from app.http.body import BodyMemory
from app.http.leaving import Departure
from app.keys.ledger import Ledger
from app.keys.usage import UsageBook
from app.metrics import Metrics
from app.processes.siblings import Siblings
from app.prompt.catalog import Models
from app.prompt.prepare import Preprocessor
from app.recording import Recorder
from app.responses.background import Background
from app.responses.store import ResponseStore
from app.serving.binding import Clock, Dispatcher
from app.serving.prefill_queue import QueuedPrefills
from app.serving.relay import Relay
from app.serving.relay import Tracer as RelayTracer
from app.settings import GatewaySettings
from app.telemetry.trace_context import TraceContext
from planes.wire.messages import RequestId
from router.router import Router


class Tracer(RelayTracer, Protocol):
    """What `app.telemetry.tracing.Tracing` does."""

    def started(self) -> TraceContext: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Gateway:
    """clock: a monotonic one.  wall_clock: seconds since 1970, for what clients read."""

    settings: GatewaySettings
    keys: ApiKeys
    ledger: Ledger
    usage: UsageBook
    models: Models
    preprocessor: Preprocessor
    bodies: BodyMemory
    router: Router
    routing_config: RoutingConfigFollower
    dispatcher: Dispatcher
    fleet: WorkerConnections
    peers: PeerNews
    relay: Relay
    responses: ResponseStore
    background: Background
    departure: Departure
    metrics: Metrics
    clock: Clock
    wall_clock: Clock
    new_request_id: Callable[[], RequestId]
    adapters: Adapters
    prefills: QueuedPrefills | None = None
    """The queue for prompts; None: they are sent to the worker chosen."""
    tracer: Tracer | None = None
    """Where traces of requests go; None: nowhere."""
    recorder: Recorder | None = None
    """Where served requests are written down; None: nowhere."""
    live: Live | None = None
    """What the console shows; None: it is not served."""
    autorole: Autorole | None = None
    """What changes workers' roles as the load changes; None: nothing here."""
    siblings: Siblings | None = None
    """The other processes of `--processes`; None: this is the only one."""
