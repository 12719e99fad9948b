"""What can happen to an exchange: the left half of the table in `exchange.py`."""

from typing import NewType

from msgspec import Struct

from app.serving.errors import LegError
from planes.wire.errors import Expired, Rejected
from planes.wire.frames import Done
from planes.wire.messages import HandoverEndpoint, RequestId, WorkerId
from router.request import Route

LegId = NewType("LegId", int)
"""Names one leg of one exchange; never used again in it."""


class Bound(Struct, frozen=True):
    """The router has chosen. endpoint: of the route's prefill worker; None: there is none, or no such worker left."""

    route: Route
    endpoint: HandoverEndpoint | None = None


class RouteRefused(Struct, frozen=True):
    """The router has not."""

    error: Rejected | Expired


class LegOutput(Struct, frozen=True):
    """A leg has tokens. Told until its first payload; after that the stream writes by itself (`Exchange.tokens`)."""

    leg: LegId
    payload: bytes
    tokens: list[int]


class LegDone(Struct, frozen=True):
    """A leg ended well. worker, job: who took the prompt from the prefill queue, and the job's name there."""

    leg: LegId
    done: Done
    worker: WorkerId | None = None
    job: RequestId | None = None


class LegFailed(Struct, frozen=True):
    """A leg was refused, lost, or gave up."""

    leg: LegId
    error: LegError


class QueueRefused(Struct, frozen=True):
    """The prefill queue cannot have this leg computed; the worker that the route names can be asked directly."""

    leg: LegId
    code: str
    reason: str


class Joined(Struct, frozen=True):
    """A worker has come up: started anew, or back."""

    worker: WorkerId


class TimeUp(Struct, frozen=True):
    """The instant of the last `WaitUntil` is there."""


class Deadline(Struct, frozen=True):
    """The request's deadline is there."""


class Silence(Struct, frozen=True):
    """The client of a streamed answer has heard nothing for a while, and shall hear that the stream lives."""


class ClientGone(Struct, frozen=True):
    """Nobody reads the answer any more."""


class Stopping(Struct, frozen=True):
    """This gateway stops."""


class Bug(Struct, frozen=True):
    """Our own code raised while it did what the exchange asked for."""

    error: Exception


Event = (
    Bound
    | RouteRefused
    | LegOutput
    | LegDone
    | LegFailed
    | QueueRefused
    | Joined
    | TimeUp
    | Deadline
    | Silence
    | ClientGone
    | Stopping
    | Bug
)
