"""What one gateway process is made of; built once, in `main.py`, and handed to whoever needs a part of it."""

from collections.abc import Callable
from dataclasses import dataclass

from app.auth import ApiKeys
from app.dispatch import Clock, Dispatcher
from app.fleet import Fleet
from app.live import LiveRouting
from app.metrics import Metrics
from app.models import Models
from app.prefills import QueuedPrefills
from app.preprocess import Preprocessor
from app.relay import Relay
from app.settings import GatewaySettings
from planes.messages import RequestId
from router.route import Router


@dataclass(frozen=True, slots=True, eq=False)
class Gateway:
    """clock: the event loop's.  wall_clock: seconds since 1970, for what clients read."""

    settings: GatewaySettings
    keys: ApiKeys
    models: Models
    preprocessor: Preprocessor
    router: Router
    live: LiveRouting
    dispatcher: Dispatcher
    fleet: Fleet
    relay: Relay
    metrics: Metrics
    clock: Clock
    wall_clock: Clock
    new_request_id: Callable[[], RequestId]
    prefills: QueuedPrefills | None = None
    """The queue for prompts; None: they are sent to the worker chosen."""
