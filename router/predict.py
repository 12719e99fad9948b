"""What it costs, in seconds, to serve a request in one given way. Used by `headrace` and to judge other rules.

    own  = queue + prefill(uncached) + handover(blocks missing at the decode worker) + first step + decoding
    total = own + inflicted
    inflicted = prefill x sequences that decode there              (each stands still meanwhile)
              + prefill x (1 / (1 - utilisation) - 1)              (congestion: everybody still to come waits longer)
              + expected_tokens x batch x (step with it - step without)

The congestion price is the mean wait that a second of work causes in a busy queue (M/G/1: work / (1 - utilisation)).
"""

from router.policy import FleetView, WorkerView
from router.request import Candidate, RoutableRequest

_MAX_UTILISATION = 0.95


def prefill_s(worker: WorkerView, prompt_tokens: int) -> float:
    """Seconds to compute a prompt there, sharing every step with the sequences that decode there."""
    uncached = prompt_tokens - worker.cached_tokens
    seconds = worker.latency.prefill_s(uncached, prompt_tokens)
    if worker.num_running and worker.role.can_decode:
        steps = -(-uncached // max(1, worker.facts.max_step_tokens))
        shared = worker.latency.step_s(worker.num_running, worker.kv_tokens) - worker.latency.step_s(0, 0)
        seconds += steps * shared
    return seconds


def prefill_inflicted_s(worker: WorkerView, seconds: float) -> float:
    """Slowdown that `seconds` of prompt work there mean for others, now and soon."""
    busy = min(worker.prefill_utilisation, _MAX_UTILISATION)
    inflicted = seconds * busy / (1 - busy)
    if worker.role.can_decode:
        inflicted += seconds * max(worker.num_running, worker.mean_running)
    return inflicted


def decode_s(worker: WorkerView, request: RoutableRequest) -> tuple[float, float, float]:
    """First step, the request's own decoding, and the slowdown it inflicts on the batch."""
    batch, kv_tokens = worker.num_running, worker.kv_tokens
    before = worker.latency.step_s(batch, kv_tokens)
    after = worker.latency.step_s(batch + 1, kv_tokens + request.prompt_tokens)
    expected = request.expected_tokens
    return after, after * expected, max(0.0, after - before) * batch * expected


def missing_bytes(decode: WorkerView, prompt_tokens: int) -> int:
    """What a handover to `decode` must move."""
    size = decode.facts.block_size
    return -(-(prompt_tokens - decode.cached_tokens) // size) * decode.facts.bytes_per_block


def local(request: RoutableRequest, worker: WorkerView) -> Candidate:
    """Prefill and decode on one worker."""
    seconds = prefill_s(worker, request.prompt_tokens)
    _, own, slowdown = decode_s(worker, request)
    inflicted = prefill_inflicted_s(worker, seconds) + slowdown
    total = worker.queue_s + seconds + own + inflicted
    cached = worker.cached_tokens
    return Candidate(None, worker.worker, cached, cached, worker.queue_s, seconds, 0.0, 0.0, inflicted, total)


def pair(request: RoutableRequest, prefill: WorkerView, decode: WorkerView, view: FleetView) -> Candidate:
    """Prefill on one worker, decode on another."""
    seconds = prefill_s(prefill, request.prompt_tokens)
    first, own, slowdown = decode_s(decode, request)
    link = view.links.link(prefill.worker, decode.worker)
    handover = link.handover_s(missing_bytes(decode, request.prompt_tokens))
    inflicted = prefill_inflicted_s(prefill, seconds) + slowdown
    total = prefill.queue_s + seconds + handover + first + own + inflicted
    return Candidate(
        prefill.worker,
        decode.worker,
        prefill.cached_tokens,
        decode.cached_tokens,
        prefill.queue_s,
        seconds,
        handover,
        first,
        inflicted,
        total,
    )


def can_hand_over(prefill: WorkerView, decode: WorkerView) -> bool:
    return prefill.worker != decode.worker and prefill.handover is not None and prefill.handover == decode.handover
