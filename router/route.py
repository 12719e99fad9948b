"""The router: one object that decides and reserves in the same step. No I/O; every method takes `now` in seconds.

This file is the contract that the gateway and the simulator are written against; see `docs/adr/` for why it queues.
"""

from dataclasses import dataclass

from planes.errors import Rejected
from planes.messages import KvEvents, LoadReport, Registration, RequestId, Snapshot, WorkerId
from router.request import Explanation, Observed, RoutableRequest, Route


@dataclass(frozen=True, slots=True)
class Refusal:
    """A queued request that will not be served; `error` says why."""

    request: RequestId
    error: Rejected


class Router:
    """Fleet, block index, queue and policy of one gateway."""

    # --- the fleet: control and event plane ---------------------------------------------------------------------

    def worker_up(self, registration: Registration, *, now: float) -> None:
        """A worker registered or changed its registration. A new epoch forgets everything about the old one."""
        raise NotImplementedError

    def worker_down(self, worker: WorkerId, *, now: float) -> None:
        """A worker's registration is gone, or its stream was found dead. Its reservations stay until released."""
        raise NotImplementedError

    def apply_events(self, batch: KvEvents, *, now: float) -> None:
        """Apply one publication; duplicates, gaps and foreign epochs are noticed here and healed by a snapshot."""
        raise NotImplementedError

    def apply_snapshot(self, snapshot: Snapshot, *, now: float) -> None:
        """Replace what is known of a worker's blocks."""
        raise NotImplementedError

    def apply_load(self, report: LoadReport, *, now: float) -> None:
        """Take over a load report; a digest that differs from our copy's marks the worker for a snapshot."""
        raise NotImplementedError

    def workers_to_snapshot(self) -> list[WorkerId]:
        """Workers whose blocks we do not know for sure. Stays so until `apply_snapshot`; the caller paces itself."""
        raise NotImplementedError

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: RoutableRequest, *, now: float) -> None:
        """Queue a request; call `dispatch` next.

        Raises:  QueueFull, SloMissed, NoWorker (all Rejected): the request is not queued.
        """
        raise NotImplementedError

    def dispatch(self, *, now: float) -> list[Route | Refusal]:
        """Bind every request whose time has come, and reserve for it. Call after anything changed, and at `wakeup`."""
        raise NotImplementedError

    def wakeup(self) -> float | None:
        """The instant at which `dispatch` should run though nothing else happened; None: no need."""
        raise NotImplementedError

    def withdraw(self, request: RequestId, *, now: float) -> None:
        """The client of a queued request went away. Unknown ids are ignored (it may just have been bound)."""
        raise NotImplementedError

    def prefilled(self, request: RequestId, *, now: float) -> None:
        """The prompt has been computed (prefill leg answered, or a local first token came): frees prefill load."""
        raise NotImplementedError

    def release(self, request: RequestId, observed: Observed, *, now: float) -> None:
        """Give back the reservation of a bound request, exactly once, and learn from it. Raises KeyError if unbound."""
        raise NotImplementedError

    # --- answers about itself --------------------------------------------------------------------------------------

    def explain(self, request: RequestId) -> Explanation | None:
        """What was decided for a recent request, and what came of it."""
        raise NotImplementedError

    def preview(self, request: RoutableRequest, *, now: float) -> Explanation:
        """What would be decided now. Changes nothing."""
        raise NotImplementedError
