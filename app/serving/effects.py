"""What an exchange asks its driver to do: the right half of the table in `exchange.py`. In order, each exactly once."""

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from app.serving.events import LegId
from planes.wire.frames import Leg
from planes.wire.messages import RequestId, WorkerId
from router.request import Observed, RoutableRequest

Headers = Sequence[tuple[str, str]]
"""Lower-case names, printable ASCII values."""


# --- to the router ---------------------------------------------------------------------------------------------------


class Submit(Struct, frozen=True):
    """Ask for a route: `Bound` or `RouteRefused` follows."""

    request: RoutableRequest


class Withdraw(Struct, frozen=True):
    """Take the question back."""


class MarkPrefilled(Struct, frozen=True):
    """The prompt of the bound request has been computed."""


class ReleaseReservation(Struct, frozen=True):
    """Give the route's reservation back, and teach the router."""

    observed: Observed


# --- to workers ------------------------------------------------------------------------------------------------------


class StartLeg(Struct, frozen=True):
    """Send a leg to a worker, with the tokens that the client has.

    `LegOutput`s follow, then `LegDone` or `LegFailed`.
    """

    leg: LegId
    worker: WorkerId
    name: RequestId
    kind: Leg


class EnqueuePrefill(Struct, frozen=True):
    """Put a prefill leg into the queue: `LegDone`, `LegFailed` or `QueueRefused` follows."""

    leg: LegId
    name: RequestId
    kind: Leg


class CancelLeg(Struct, frozen=True):
    """Nothing follows of this leg."""

    leg: LegId


class ReleaseTicket(Struct, frozen=True):
    """The KV cache that `worker` keeps, or may keep by now, for this leg will not be taken. job: as in `LegDone`."""

    worker: WorkerId
    name: RequestId
    job: RequestId | None = None


# --- to the client ---------------------------------------------------------------------------------------------------


class Head(Struct, frozen=True):
    """Begin a streamed answer."""

    headers: Headers


class Write(Struct, frozen=True):
    """Send these bytes, verbatim. Never empty."""

    payload: bytes


class Finish(Struct, frozen=True):
    """End a streamed answer after these bytes, which may be none."""

    payload: bytes


class Reply(Struct, frozen=True):
    """Answer in one piece."""

    payload: bytes
    headers: Headers


class Fail(Struct, frozen=True):
    """Tell the client of an error: in place of an answer, or as the last event of one that has begun."""

    error: Exception
    headers: Headers


# --- to the clock, the log and the metrics ---------------------------------------------------------------------------


class WaitUntil(Struct, frozen=True):
    """Tell `TimeUp` at this instant; it takes the place of the one before."""

    instant: float


class Noted(StrEnum):
    """What an operator should see, beside the end: events of the log."""

    RETRIED = "request.retried"
    """A leg failed and will be run elsewhere; the client has no token."""
    MIGRATED = "request.migrated"
    """… and the client has some."""
    FELL_BACK = "request.fell_back"
    """Served without a handover because the one before failed."""
    BYPASSED = "prefill_queue.bypassed"
    """A prompt goes past the prefill queue."""
    WAITING = "request.waits_for_worker"
    """No worker is left; a begun answer waits for one."""
    REPLACED = "request.goes_on"
    """A worker has come to go on with it."""
    GAVE_UP = "request.waited_in_vain"
    """None came in time."""


class Note(Struct, frozen=True):
    """Count and log. code: of the error behind it."""

    what: Noted
    code: str = ""
    reason: str = ""


Effect = (
    Submit
    | Withdraw
    | MarkPrefilled
    | ReleaseReservation
    | StartLeg
    | EnqueuePrefill
    | CancelLeg
    | ReleaseTicket
    | Head
    | Write
    | Finish
    | Reply
    | Fail
    | WaitUntil
    | Note
)
