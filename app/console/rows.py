"""What the console's page is told of a worker, a request and a handover. Its field names are the page's."""

from collections.abc import Iterable, Mapping

import msgspec

from app.fleet.status import RegisteredWorker
from planes.wire.messages import Role, WorkerId, WorkerState
from router.stats import WorkerStatus
from router.timeline import StageKind, Timeline

_STALE_S = 5.0
"""Workers report every second at least."""


class WorkerRow(msgspec.Struct, frozen=True):
    """One worker. Rates are of the last tick; of the last requests' `prompt_tokens`, `hit_tokens` were cached."""

    role: Role
    becoming: Role | None
    model: str
    engine: str
    state: WorkerState
    is_connected: bool
    is_stale: bool
    """It has a stream and has not reported for seconds."""
    refused_because: str
    started_at: int
    """Seconds since 1970."""
    card: str
    layout: str
    block_size: int
    num_blocks: int
    bytes_per_block: int
    max_batch: int
    context_length: int
    num_streams: int
    """Requests of this gateway on it."""
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    free_blocks: int
    num_cached: int
    kv_tokens: int
    queue_s: float
    utilisation: float
    speed: float
    is_exact: bool
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    hit_tokens: int


def worker_row(
    worker: RegisteredWorker, view: WorkerStatus | None, *, rates: tuple[float, float], hits: tuple[int, int]
) -> WorkerRow:
    """view: the router's, if it routes there.  rates: tokens prefilled and decoded a second.  hits: cached, all."""
    facts, load = worker.facts, worker.load
    return WorkerRow(
        role=worker.role,
        becoming=worker.becoming,
        model=worker.model,
        engine=worker.engine,
        state=worker.state,
        is_connected=worker.is_connected,
        is_stale=view is not None and (view.reported_s is None or view.reported_s > _STALE_S),
        refused_because=worker.refused_because,
        started_at=worker.epoch // 10**9,
        card=worker.card[:12],
        layout=worker.layout[:12],
        block_size=facts.block_size,
        num_blocks=facts.num_blocks,
        bytes_per_block=facts.bytes_per_block,
        max_batch=facts.max_batch,
        context_length=facts.context_length,
        num_streams=worker.num_streams,
        num_running=load.num_running if load else 0,
        num_waiting=load.num_waiting if load else 0,
        waiting_prefill_tokens=load.waiting_prefill_tokens if load else 0,
        free_blocks=load.free_blocks if load else facts.num_blocks,
        num_cached=load.num_cached if load else 0,
        kv_tokens=load.kv_tokens if load else 0,
        queue_s=round(view.queue_s, 3) if view else 0.0,
        utilisation=round(view.utilisation, 3) if view else 0.0,
        speed=round(view.speed, 2) if view else 1.0,
        is_exact=view is not None and view.is_exact,
        prefill_tokens_per_s=round(rates[0], 1),
        decode_tokens_per_s=round(rates[1], 1),
        prompt_tokens=hits[1],
        hit_tokens=hits[0],
    )


def changed(before: WorkerRow | None, after: WorkerRow) -> dict[str, object]:
    """The fields that differ, by name; all of them if it was not there."""
    values = {name: getattr(after, name) for name in after.__struct_fields__}
    if before is None:
        return values
    return {name: value for name, value in values.items() if value != getattr(before, name)}


class RequestRow(msgspec.Struct, frozen=True):
    """One request that has ended. stages: kind, begin and end in seconds since it came."""

    id: str
    received_at: float
    """Seconds since 1970."""
    model: str
    code: str
    prefill: str | None
    decode: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    ttft_s: float | None
    itl_s: float | None
    end_s: float
    num_attempts: int
    stages: list[tuple[StageKind, float, float]]


def request_row(timeline: Timeline, *, received_at: float) -> RequestRow:
    """received_at: seconds since 1970."""
    return RequestRow(
        id=timeline.request,
        received_at=round(received_at, 3),
        model=timeline.model,
        code=timeline.code,
        prefill=timeline.prefill,
        decode=timeline.decode,
        prompt_tokens=timeline.prompt_tokens,
        completion_tokens=timeline.completion_tokens,
        cached_tokens=timeline.cached_tokens,
        ttft_s=None if timeline.ttft_s is None else round(timeline.ttft_s, 5),
        itl_s=None if timeline.itl_s is None else round(timeline.itl_s, 6),
        end_s=round(timeline.end_s, 4),
        num_attempts=max((stage.attempt for stage in timeline.stages), default=1),
        stages=[(stage.kind, round(stage.begin_s, 4), round(stage.end_s, 4)) for stage in timeline.stages],
    )


class HandoverRow(msgspec.Struct, frozen=True, array_like=True):
    """Handovers between two workers that ended in one tick. seconds: of all of them together."""

    source: WorkerId
    worker: WorkerId
    count: int
    num_bytes: int
    seconds: float


def handover_rows(timelines: Iterable[Timeline], limit: int) -> list[HandoverRow]:
    """By pair of workers, those that moved most first."""
    sums: dict[tuple[WorkerId, WorkerId], tuple[int, int, float]] = {}
    for timeline in timelines:
        for stage in timeline.stages:
            if stage.kind is StageKind.HANDOVER and stage.source is not None and stage.worker is not None:
                count, moved, took_s = sums.get((stage.source, stage.worker), (0, 0, 0.0))
                took_s += stage.end_s - stage.begin_s
                sums[stage.source, stage.worker] = count + 1, moved + stage.num_bytes, took_s
    rows = [HandoverRow(*pair, count, moved, round(took_s, 5)) for pair, (count, moved, took_s) in sums.items()]
    return sorted(rows, key=lambda row: row.num_bytes, reverse=True)[:limit]


def total_hits(hits: Mapping[WorkerId, tuple[int, int]]) -> tuple[int, int]:
    """Cached prompt tokens, and all, of all workers."""
    return sum(cached for cached, _ in hits.values()), sum(prompt for _, prompt in hits.values())
