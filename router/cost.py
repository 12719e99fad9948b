"""What it costs, in seconds, to serve a request in one given way. Used by `headrace` and to judge other rules.

    total = queue + prefill(uncached) + handover(blocks missing at the decode worker) + first step + its own decoding
            + inflicted

    inflicted = prefill * sequences that decode there * stall        (each stands still meanwhile)
              + prefill * prompts there that it passes               (being shorter: they begin later)
              + prefill * max(utilisation^n / (1 - utilisation),     (congestion: those still to come wait longer, and
                              requests waiting / workers)             so do those who wait)
              + expected_tokens * batch * (step with it - step without)

A stall counts the more the less a worker gets to decode. A stream that gets a token per step while the worker
computes no prompt is 1 / (1 - utilisation) times slower than alone: at first nobody notices, in the end it misses
every limit. Another second of prompt work costs each stream 0.04 / (1 - utilisation)^1.5 s on a worker that does
both, and on one kept for decoding 0.3 / (1 - utilisation)^2 s: next to nothing while streams are fast, and so much
when they are slow that prompts gather on few workers and the others decode for them. On the latter a prompt that
comes in small chunks costs less: a pause of one step nothing, one of ten or more the whole. Where no stream is now,
those that may come (the mean of a minute) count as if streams were fast. ADR 21 has the reasons.

Its own stream is charged like anybody's: for prompts that are left where it begins to decode; and where the client gets
the prefill worker's token at once, for the handover and the first step after it, which then only interrupt the stream.

The congestion price is what a second of work adds to the waits of others. Workers share the gateway's queue, and an
arrival waits only when all that it may go to are busy: with k servers the wait grows with utilisation^n / (1 -
utilisation), n = sqrt(2 k + 2) - 1 (Sakasegawa 1977). Cached prefixes tie requests to some of the workers, so k is
the root of their number. Where requests are waiting each second of work delays those that this worker would serve by
a second. Utilisation is averaged over a minute and knows of no burst yet; the queue does at once. It counts up to
0.8: above that the queue is what tells.
"""

import math
from collections.abc import Sequence

import msgspec

from planes.wire.messages import WorkerId
from router.latency import LinkModel
from router.policy import FleetView, WorkerView
from router.request import Candidate, RoutableRequest


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """The measured constants of the price, see ADR 8 and ADR 21. What is not in seconds has no unit."""

    max_utilisation: float = 0.8
    """Busier than this is not told apart: there the queue is what tells."""
    stall_both: float = 0.04
    """Seconds of waiting for a first token that a second of standing still counts for, on a worker that does both."""
    stall_both_power: float = 1.5
    """By which power of 1 / (1 - utilisation) that grows."""
    stall_decode: float = 0.3
    """The same on a worker kept for decoding."""
    stall_decode_power: float = 2.0
    noticed_steps: int = 10
    """A pause of so many decode steps counts in full, one of a single step not at all."""
    round_trip_s: float = 0.01
    """From a worker's report to the next prompt's arrival there: work for so long has to lie ready."""
    patience: float = 4.0
    """How many times as long as it took to compute a KV cache may wait for room to decode."""
    shared_steps: float = 16.0
    """Prompts are brought together in a step as long as they take at most so many times its fixed cost."""
    near: float = 1.003
    """Costs this close are equal, and a random one wins: several gateways must not all pick the same worker."""


MEASURED = CostModel()


class PrefillCost(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Computing the prompt on one worker. `cost_s` is all that this leg adds to the total."""

    worker: WorkerView
    queue_s: float
    prefill_s: float
    inflicted_s: float
    cost_s: float


class DecodeCost(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Decoding on one worker. `first_step_s` counts the wait for room; `cost_s` has everything but the handover."""

    worker: WorkerView
    first_step_s: float
    decode_s: float
    inflicted_s: float
    cost_s: float
    prompts_s: float
    """Prompt work there, with which its decoding shares steps until it is done."""
    stall: float
    """What a second of that costs it."""
    missing_bytes: int
    has_room: bool


class Congestion(msgspec.Struct, frozen=True, kw_only=True):
    """What a second of prompt work adds to the waits of others, in seconds, by how busy its worker is."""

    waiting: float = 0.0
    """Requests in the gateway's queue, per worker that could take them."""
    power: float = 1.0

    def price(self, utilisation: float) -> float:
        """`utilisation`: 0.0 to less than 1."""
        return max(float(utilisation**self.power) / (1 - utilisation), self.waiting)


def congestion(view: FleetView) -> Congestion:
    """The same for all workers of a view."""
    num_workers = max(1, len(view.prefill) or len(view.decode))
    return Congestion(
        waiting=max(0, view.num_waiting - 1) / num_workers, power=math.sqrt(2 * math.sqrt(num_workers) + 2) - 1
    )


NO_CONGESTION = Congestion()


def prefill_cost(
    request: RoutableRequest, worker: WorkerView, congested: Congestion = NO_CONGESTION, model: CostModel = MEASURED
) -> PrefillCost:
    uncached = request.prompt_tokens - worker.cached_tokens
    seconds = worker.latency.prefill_s(uncached, request.prompt_tokens)
    queue = worker.starts_in_s if worker.num_passed else worker.queue_s
    busy = min(worker.prefill_utilisation, model.max_utilisation)
    stalled_s = 0.0
    if worker.role.can_decode and (worker.num_running or worker.mean_running):
        stall = _stall(worker, uncached, busy if worker.num_running else 0.0, model)
        stalled_s = seconds * stall * max(worker.num_running, worker.mean_running)
        if worker.num_running:  # every step of the prompt carries the batch along, and begins when the current one ends
            step = worker.latency.step_s(worker.num_running, worker.kv_tokens)
            steps = -(-uncached // max(1, worker.facts.max_step_tokens - worker.num_running))
            seconds += steps * max(0.0, step - worker.latency.step_s(0, 0))
            queue += step / 2
    inflicted = stalled_s + seconds * (congested.price(busy) + worker.num_passed)
    return PrefillCost(
        worker=worker, queue_s=queue, prefill_s=seconds, inflicted_s=inflicted, cost_s=queue + seconds + inflicted
    )


def _stall(worker: WorkerView, uncached_tokens: int, busy: float, model: CostModel) -> float:
    """What a second of standing still costs a stream, against a second of waiting for a first token."""
    if worker.role.can_prefill:
        return model.stall_both / float((1 - busy) ** model.stall_both_power)
    chunk = min(uncached_tokens, worker.facts.max_step_tokens)
    pause_s = worker.latency.prefill_s(chunk, chunk)
    step_s = worker.latency.step_s(worker.num_running, worker.kv_tokens)
    longer_s, noticed_s = max(0.0, pause_s - step_s), (model.noticed_steps - 1) * step_s
    share = longer_s / noticed_s if longer_s < noticed_s else 1.0
    return share * model.stall_decode / float((1 - busy) ** model.stall_decode_power)


def decode_cost(request: RoutableRequest, worker: WorkerView, model: CostModel = MEASURED) -> DecodeCost:
    batch, kv_tokens, facts = worker.num_running, worker.kv_tokens, worker.facts
    expected, busy = request.expected_tokens, min(worker.prefill_utilisation, model.max_utilisation)
    before = worker.latency.step_s(batch, kv_tokens)
    after = worker.latency.step_s(batch + 1, kv_tokens + request.prompt_tokens)
    slowdown = max(0.0, after - before) * batch * expected
    decoding = after * expected / (1 - busy)
    first = after
    needed = -(-(request.prompt_tokens - worker.cached_tokens + expected) // facts.block_size)
    has_room = not batch or (batch < facts.max_batch and needed <= worker.free_blocks)
    if not has_room:  # somebody has to finish first: on average one does so every `decoding / batch`
        first += decoding / batch
    missing = -(-(request.prompt_tokens - worker.cached_tokens) // facts.block_size) * facts.bytes_per_block
    stall = _stall(worker, facts.max_step_tokens, busy, model) if worker.queue_s else 0.0
    return DecodeCost(
        worker=worker,
        first_step_s=first,
        decode_s=decoding,
        inflicted_s=slowdown,
        cost_s=first + decoding + slowdown,
        prompts_s=worker.queue_s,
        stall=stall,
        missing_bytes=missing,
        has_room=has_room,
    )


def _stalled_s(decode: DecodeCost, begins_s: float) -> float:
    """What the prompts that are left there when it begins to decode cost it."""
    return decode.stall * max(0.0, decode.prompts_s - begins_s)


def local(prefill: PrefillCost, decode: DecodeCost) -> Candidate:
    """Both legs on one worker: the prompt's last step gives the first token."""
    worker = decode.worker
    wait = 0.0 if decode.has_room else decode.first_step_s
    stalled_s = 0.0
    if worker.num_passed:  # else nothing is left there when it begins to decode
        stalled_s = _stalled_s(decode, prefill.queue_s + prefill.prefill_s)
    return Candidate(
        prefill=None,
        decode=worker.worker,
        cached_tokens=worker.cached_tokens,
        decode_cached_tokens=worker.cached_tokens,
        queue_s=prefill.queue_s,
        prefill_s=prefill.prefill_s,
        handover_s=0.0,
        first_step_s=wait,
        inflicted_s=prefill.inflicted_s + decode.inflicted_s,
        total_s=prefill.cost_s + wait + decode.decode_s + stalled_s + decode.inflicted_s,
        decode_s=decode.decode_s + stalled_s,
        num_passed=worker.num_passed,
    )


def pair(
    request: RoutableRequest, prefill: PrefillCost, decode: DecodeCost, link: LinkModel, model: CostModel = MEASURED
) -> Candidate:
    """The legs on two workers, and the handover between them."""
    handover = link.handover_s(decode.missing_bytes)
    stalled_s = _stalled_s(decode, prefill.queue_s + prefill.prefill_s + handover) if decode.prompts_s else 0.0
    early_s = (1 - model.stall_decode) * (handover + decode.first_step_s) if request.is_first_token_exact else 0.0
    return Candidate(
        prefill=prefill.worker.worker,
        decode=decode.worker.worker,
        cached_tokens=prefill.worker.cached_tokens,
        decode_cached_tokens=decode.worker.cached_tokens,
        queue_s=prefill.queue_s,
        prefill_s=prefill.prefill_s,
        handover_s=handover,
        first_step_s=decode.first_step_s,
        inflicted_s=prefill.inflicted_s + decode.inflicted_s,
        total_s=prefill.cost_s + handover + stalled_s + decode.cost_s - early_s,
        is_first_early=request.is_first_token_exact,
        decode_s=decode.decode_s + stalled_s,
        num_passed=prefill.worker.num_passed,
        early_token_discount_s=early_s,
    )


def can_hand_over(prefill: WorkerView, decode: WorkerView) -> bool:
    return prefill.worker != decode.worker and prefill.handover is not None and prefill.handover == decode.handover


def judge(request: RoutableRequest, chosen: Candidate, view: FleetView) -> Candidate:
    """Another rule's choice, with our predictions. A pair that cannot hand over is served by its decode worker alone.

    Raises:  ValueError if a worker it names is not in `view`.
    """
    decode = _named(view.decode, chosen.decode)
    leg, congested = decode_cost(request, decode), congestion(view)
    if chosen.prefill is not None and chosen.prefill != chosen.decode:
        prefill = _named(view.prefill, chosen.prefill)
        if can_hand_over(prefill, decode):
            link = view.links.link(prefill.worker, decode.worker)
            return pair(request, prefill_cost(request, prefill, congested), leg, link)
    return local(prefill_cost(request, decode, congested), leg)


def _named(workers: Sequence[WorkerView], name: WorkerId) -> WorkerView:
    for worker in workers:
        if worker.worker == name:
            return worker
    raise ValueError(f"the policy chose worker {name!r}, which is not among those offered")
