"""How serving a request can fail: what a worker's words stand for, and what only the gateway can tell."""

from typing import Final

from planes.streams.client import WorkerLost, WorkerUnreachable
from planes.wire.errors import (
    ROLE_CHANGED,
    TOLD_BY_WORKERS,
    Expired,
    HeadraceError,
    Interrupted,
    InvalidRequest,
    Rejected,
)
from planes.wire.frames import Failed, FailureKind
from planes.wire.messages import WorkerId

_BUSY_CODE = "worker_busy"
_EXPIRED_CODE = "ticket_expired"


class WorkerRefused(Rejected):
    """The worker would not take the request: it leaves, or does not serve what it was asked."""

    def __init__(self, worker: WorkerId, code: str, reason: str) -> None:
        super().__init__(f"worker {worker} refused the request: {reason}")
        self.worker = worker
        self.code = code

    def for_client(self) -> str:
        return f"worker {self.worker} refused the request ({self.code})"


class WorkerBusy(Rejected):
    """The worker has as many requests as it takes. It is well, and will have room again."""

    code = _BUSY_CODE

    def __init__(self, worker: WorkerId, reason: str) -> None:
        super().__init__(f"worker {worker} has no room: {reason}; try again in a second", retry_after_s=1.0)
        self.worker = worker

    def for_client(self) -> str:
        return f"worker {self.worker} has no room; try again in a second"


class RoleChanged(Rejected):
    """The worker does not do this any more. It is well, and this gateway is about to hear of its new role."""

    code = ROLE_CHANGED

    def __init__(self, worker: WorkerId, reason: str) -> None:
        super().__init__(f"worker {worker} has another role now: {reason}; try again in a second", retry_after_s=1.0)
        self.worker = worker

    def for_client(self) -> str:
        return f"worker {self.worker} has another role now; try again in a second"


class WorkerFailed(Interrupted):
    """The worker began and could not go on."""

    def __init__(self, worker: WorkerId, code: str, reason: str) -> None:
        super().__init__(f"worker {worker} could not go on: {reason}")
        self.worker = worker
        self.code = code

    def for_client(self) -> str:
        return f"worker {self.worker} could not go on ({self.code})"


class WorkerDisagrees(Interrupted):
    """The worker finds invalid what this gateway has found valid: the fleet's fault, not the client's."""

    code = "worker_disagrees"

    def __init__(self, worker: WorkerId, code: str, reason: str) -> None:
        super().__init__(f"worker {worker} would not compute what this gateway has found valid ({code}): {reason}")
        self.worker = worker
        self.refused_with = code

    def for_client(self) -> str:
        return f"worker {self.worker} would not compute what this gateway has found valid ({self.refused_with})"


class EngineRefused(InvalidRequest):
    """The engine cannot serve what the client asks: the client's fault. Only workers can tell, the first for all."""

    def __init__(self, worker: WorkerId, code: str, message: str, param: str | None) -> None:
        super().__init__(message, param=param, code=code)
        self.worker = worker


class TicketExpired(Interrupted):
    """A prompt's KV cache was not taken within its lease: nobody's fault."""

    code = _EXPIRED_CODE

    def __init__(self, worker: WorkerId, reason: str) -> None:
        super().__init__(f"the KV cache kept by worker {worker} was not taken in time: {reason}")
        self.worker = worker

    def for_client(self) -> str:
        return f"the KV cache kept by worker {self.worker} was not taken in time"


WorkerSaid = WorkerRefused | WorkerBusy | RoleChanged | WorkerFailed | WorkerDisagrees | TicketExpired
"""What a worker's Failed stands for, where the leg may be run elsewhere."""

Retriable = WorkerUnreachable | WorkerLost | WorkerSaid
"""How a leg can end that may be run elsewhere. Each names its `worker`."""

LegError = Retriable | EngineRefused
"""How a leg can end, but well."""


class DeadlinePassed(Expired):
    """Time is up. Not `Interrupted`: continuing elsewhere would not give more of it."""

    code = "deadline"

    def __init__(self, timeout_s: float, num_tokens: int) -> None:
        super().__init__(f"the request's limit of {timeout_s:g} s passed after {num_tokens} tokens; allow it more time")


class GatewayStopping(Interrupted):
    """This gateway stops and the request did not end in time."""

    code = "gateway_stopping"

    def __init__(self) -> None:
        super().__init__("the gateway is stopping; send the request again")


class NotResumable(Interrupted):
    """A worker was lost after the client had got a part of what no other can go on with."""

    code = "not_resumable"

    def __init__(self, n: int, reason: str) -> None:
        what = f"an answer of n = {n} choices" if n > 1 else "an answer with these parameters"
        self._told = f"{what} cannot be continued on another worker"
        super().__init__(f"{self._told}: {reason}")

    def for_client(self) -> str:
        return self._told


_BY_CODE: Final[dict[tuple[FailureKind, str], type[WorkerBusy | RoleChanged | TicketExpired]]] = {
    (FailureKind.REJECTED, _BUSY_CODE): WorkerBusy,
    (FailureKind.REJECTED, ROLE_CHANGED): RoleChanged,
    (FailureKind.INTERRUPTED, ROLE_CHANGED): RoleChanged,
    (FailureKind.INTERRUPTED, _EXPIRED_CODE): TicketExpired,
}


def leg_error(failed: Failed, worker: WorkerId) -> WorkerSaid | EngineRefused:
    """What a worker says went wrong, as one of our errors."""
    known = _BY_CODE.get((failed.kind, failed.code))
    if known is not None:
        return known(worker, failed.message)
    match failed.kind:
        case FailureKind.INVALID if failed.code in TOLD_BY_WORKERS:
            return EngineRefused(worker, failed.code, failed.message, failed.param)
        case FailureKind.INVALID:
            return WorkerDisagrees(worker, failed.code, failed.message)
        case FailureKind.REJECTED:
            return WorkerRefused(worker, failed.code, failed.message)
        case FailureKind.INTERRUPTED:
            return WorkerFailed(worker, failed.code, failed.message)


def worker_of(exc: HeadraceError) -> WorkerId | None:
    """The worker that an error names."""
    return getattr(exc, "worker", None)
