"""What this gateway shows of its workers: rows for `GET /v1/fleet`, numbers for the metrics."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from app.metrics import Gauge
from planes.wire.messages import EngineFacts, LoadReport, Registration, Role, WorkerState


@dataclass(frozen=True, slots=True)
class RegisteredWorker:
    """One worker: its registration, this gateway's stream to it, and what it last said of its load."""

    worker: str
    role: Role
    model: str
    engine: str
    address: str
    epoch: int
    state: WorkerState
    is_connected: bool
    num_streams: int
    """Requests of this gateway on the worker."""
    card: str
    """Digest of its model card: requests prepared by another one do not go there."""
    layout: str
    """Compatibility hash of its KV cache: it hands over to workers with the same alone."""
    facts: EngineFacts
    load: LoadReport | None
    """The last report, without its steps."""
    refused_because: str = ""
    """Why this gateway sends it nothing; empty: it does, or cannot reach it."""
    becoming: Role | None = None
    """The role that it takes as soon as it has ended what it will not do any more."""
    is_pinned: bool = False
    """Its role was asked for by hand: `--autorole` leaves it alone."""


def registered_worker(
    registration: Registration, load: LoadReport | None, *, num_streams: int | None, refused_because: str = ""
) -> RegisteredWorker:
    """`num_streams`: None if there is no connection."""
    return RegisteredWorker(
        worker=registration.worker,
        role=registration.role,
        model=registration.model,
        engine=registration.engine,
        address=registration.address,
        epoch=registration.epoch,
        state=registration.state,
        is_connected=num_streams is not None,
        num_streams=num_streams or 0,
        card=registration.card_digest,
        layout=registration.layout,
        facts=registration.facts,
        load=None if load is None else msgspec.structs.replace(load, steps=[]),
        refused_because=refused_because,
        becoming=registration.becoming,
        is_pinned=registration.is_pinned,
    )


def worker_gauges(workers: list[RegisteredWorker]) -> Iterator[Gauge]:
    """For the metrics."""
    counts = Counter((worker.role.value, "up" if worker.is_connected else "down") for worker in workers)
    for (role, state), count in counts.items():
        yield Gauge("workers", "Registered workers, by stream.", count, (("role", role), ("stream", state)))
    refused = sum(bool(worker.refused_because) for worker in workers)
    yield Gauge("workers_refused", "Workers that get nothing because of their card or how they render it.", refused)
    for worker in workers:
        if (load := worker.load) is not None:
            label = (("worker", worker.worker),)
            yield Gauge("worker_blocks", "Blocks held.", load.num_cached, label)
            yield Gauge("worker_running", "Running requests.", load.num_running, label)
            yield Gauge("worker_waiting", "Waiting requests.", load.num_waiting, label)
