"""What it costs, in seconds, to serve a request in one given way. Used by `headrace` and to judge other rules.

    total = queue + prefill(uncached) + handover(blocks missing at the decode worker) + first step + its own decoding
            + inflicted

    inflicted = what it adds to steps * sequences that decode there * price of a stall
              + its work * prompts that share its first step              (which ends so much later)
              + what it adds to steps * prompts there that it passes      (being shorter: they begin later)
              + its share of steps * price of congestion                  (those who wait, and those still to come)
              + expected_tokens * batch * (step with it - step without)

A worker computes in steps (`router/steps.py`): a prompt that fits into one that begins anyway adds its work alone, one
that does not makes another step; where sequences decode they would have had a step at that time, too. Prices are in
`router/prices.py`.

Its own stream is charged like anybody's: for prompts that are left where it begins to decode; and where the client gets
the prefill worker's token at once, for the handover and the first step after it, which then only interrupt the stream.

Seconds decide between ways that give up the same. What a way gives up (`gives_up`) goes before them, worst first: the
time between tokens of a stream that it touches, its own included; its own time to the first token; that no stream on a
worker kept for decoding stands still for long, which goes first where no SLO speaks of streams.
"""

from collections.abc import Sequence

from planes.wire.messages import WorkerId
from router.latency import LinkModel
from router.policy import FleetView, WorkerView
from router.prices import MEASURED, NO_CONGESTION, NO_GOALS, Congestion, CostModel, Goals, congestion, stall_price
from router.request import SACRIFICE_S, Candidate, RoutableRequest, Sacrifice


class PrefillCost:
    """Computing the prompt on one worker. `cost_s` is all that this leg adds to the total.

    No struct, for the reason that `Goals` is none.
    """

    def __init__(
        self,
        worker: WorkerView,
        queue_s: float,
        prefill_s: float,
        work_s: float,
        inflicted_s: float,
        congestion_s: float,
        shared_s: float,
        room_s: float,
        longer_s: float,
        misses_itl: bool,
        misses_ttft: bool,
        pauses: bool,
    ) -> None:
        self.worker, self.name = worker, worker.worker
        self.queue_s = queue_s
        self.prefill_s = prefill_s
        """From the beginning of its first step to the end of its last, what is in them of others included."""
        self.work_s = work_s
        """Of the worker's time: its work, and its share of the steps."""
        self.inflicted_s = inflicted_s
        self.congestion_s = congestion_s
        """Of `inflicted_s`, for those who wait in the gateway and those still to come."""
        self.shared_s = shared_s
        """Of `prefill_s` and `inflicted_s`, what it waits for prompts of the step that it joins, and they for it."""
        self.cost_s = queue_s + prefill_s + inflicted_s
        self.room_s = room_s
        """Until there is room for it beside those that decode there, should it decode elsewhere."""
        self.longer_s = longer_s
        """So much longer the step that it shares takes with it; 0: it shares none."""
        self.misses_itl = misses_itl
        """A stream there would miss its SLO."""
        self.misses_ttft = misses_ttft
        """A prompt in its first step would."""
        self.pauses = pauses
        """Streams on a worker kept for decoding would stand still for long."""


class DecodeCost:
    """Decoding on one worker. `first_step_s` counts the wait for room; `cost_s` has everything but the handover."""

    def __init__(
        self,
        worker: WorkerView,
        room_s: float,
        gap_s: float,
        decode_s: float,
        inflicted_s: float,
        prompts_s: float,
        stall: float,
        missing_bytes: int,
    ) -> None:
        self.worker, self.name = worker, worker.worker
        self.room_s = room_s
        """Until there is room for it."""
        self.has_room = not room_s
        self.gap_s = gap_s
        """Between two of its tokens, where no prompt is computed beside."""
        self.first_step_s = room_s + gap_s
        self.decode_s = decode_s
        self.inflicted_s = inflicted_s
        self.cost_s = room_s + gap_s + decode_s + inflicted_s
        self.prompts_s = prompts_s
        """Prompt work there, with which its decoding shares steps until it is done."""
        self.stall = stall
        """What a second of standing still costs it."""
        self.missing_bytes = missing_bytes


class Way:
    """One way to serve a request: two legs, of one worker or of two, and what only both together tell.

    Hundreds are weighed and few are told of, so a `Candidate` is made of those alone.
    """

    def __init__(
        self,
        prefill: PrefillCost,
        decode: DecodeCost,
        queue_s: float,
        handover_s: float,
        first_step_s: float,
        stalled_s: float,
        total_s: float,
        given_up: int,
        waits_for_room: WorkerId | None,
        is_first_early: bool = False,
        early_token_discount_s: float = 0.0,
    ) -> None:
        self.prefill, self.decode = prefill, decode
        self.is_local = prefill.worker is decode.worker
        self.queue_s, self.handover_s, self.first_step_s = queue_s, handover_s, first_step_s
        self.stalled_s = stalled_s
        """What it costs that its own stream stands still."""
        self.total_s = total_s
        self.gives_up = _SACRIFICES[given_up]
        self.order_s = total_s + given_up * SACRIFICE_S
        """Seconds, after what is given up."""
        self.waits_for_room = waits_for_room
        self.is_first_early, self.early_token_discount_s = is_first_early, early_token_discount_s

    def candidate(self) -> Candidate:
        """All that there is to tell of it."""
        prefill, decode = self.prefill, self.decode
        sender, receiver = prefill.worker, decode.worker
        return Candidate(
            None if self.is_local else prefill.name,
            decode.name,
            sender.cached_tokens,
            receiver.cached_tokens,
            self.queue_s,
            prefill.prefill_s,
            self.handover_s,
            self.first_step_s,
            prefill.inflicted_s + decode.inflicted_s,
            self.total_s,
            self.is_first_early,
            decode.decode_s + self.stalled_s,
            sender.num_passed,
            self.gives_up,
            self.waits_for_room,
            prefill.work_s,
            self.early_token_discount_s,
            prefill.congestion_s,
            prefill.misses_itl,
            prefill.misses_ttft,
            prefill.shared_s,
        )


def prefill_cost(
    request: RoutableRequest,
    worker: WorkerView,
    congested: Congestion = NO_CONGESTION,
    model: CostModel = MEASURED,
) -> PrefillCost:
    latency, batch = worker.latency, worker.num_streams
    uncached = request.prompt_tokens - worker.cached_tokens
    queue, shared_tokens, shared_s, num_sharing = (
        (worker.starts_in_s, 0, 0.0, 0)
        if worker.num_passed
        else (worker.queue_s, worker.shared_tokens, worker.shared_s, worker.num_sharing)
    )
    work = latency.work_s(uncached, request.prompt_tokens)
    fixed = latency.fixed_s(batch, worker.kv_tokens)
    budget = max(1, worker.facts.max_step_tokens - batch)
    free = budget - shared_tokens if shared_tokens else 0
    new_steps = -(-(uncached - free) // budget) if uncached > free else 0
    added = work + fixed * new_steps
    share = work + fixed * uncached / budget if uncached < budget else added
    longer, misses_ttft = 0.0, False
    if shared_tokens:
        longer = work * free / uncached if uncached > free else work
        misses_ttft = longer + model.round_trip_s > worker.late_in_s
    busy = min(worker.prefill_utilisation, model.max_utilisation)
    stalled, room, misses_itl, pauses = 0.0, 0.0, False, False
    if worker.role.can_decode and (batch or worker.mean_running):
        # Where nobody decodes now those count that may come, as if streams were fast.
        step = latency.step_s(batch or 1, worker.kv_tokens)
        stall = work + new_steps * (fixed - step if fixed > step else 0.0) if batch else added
        price = stall_price(request, worker, step, busy if batch else 0.0, model)
        stalled = stall * price * max(batch, worker.mean_running)
        if batch:
            room = _room_s(worker, uncached, step * (worker.mean_expected or request.expected_tokens) / (1 - busy))
            queue += step / 2  # the step in progress has to end
            misses_itl = stall > worker.stall_left_s
            if not worker.role.can_prefill:
                chunk = min(uncached, budget)
                pauses = fixed + work * chunk / uncached > model.pause_steps * step
    queued = share * congested.price(worker.worker, busy)
    delaying = num_sharing * work
    inflicted = stalled + delaying + added * worker.num_passed + queued
    seconds = shared_s + work + fixed * (new_steps + (shared_tokens > 0))
    shared = shared_s + delaying
    return PrefillCost(
        worker, queue, seconds, share, inflicted, queued, shared, room, longer, misses_itl, misses_ttft, pauses
    )


def decode_cost(request: RoutableRequest, worker: WorkerView, model: CostModel = MEASURED) -> DecodeCost:
    facts, kv_tokens = worker.facts, worker.kv_tokens
    expected, busy = request.expected_tokens, min(worker.prefill_utilisation, model.max_utilisation)
    here = max(worker.num_running, worker.num_streams) + worker.without_room
    batch = min(here, facts.max_batch - 1)
    before = worker.latency.step_s(batch, kv_tokens)
    after = worker.latency.step_s(batch + 1, kv_tokens + request.prompt_tokens)
    slowdown = max(0.0, after - before) * batch * expected
    decoding = after * expected / (1 - busy)
    uncached = request.prompt_tokens - worker.cached_tokens
    room = _room_s(worker, uncached + expected, decoding)
    missing = -(-uncached // facts.block_size) * facts.bytes_per_block
    if expected == 1:  # it comes with the prompt's last step, and nothing is behind it that could stand still
        return DecodeCost(worker, room, after, 0.0, 0.0, 0.0, 0.0, missing)
    stall = stall_price(request, worker, after, busy, model)
    return DecodeCost(worker, room, after, decoding, slowdown, worker.queue_s + worker.shared_s, stall, missing)


def _room_s(worker: WorkerView, tokens: int, decoding_s: float) -> float:
    """Until there is a place in the batch, and KV blocks for so many tokens; 0: there is.

    decoding_s: how long a sequence keeps them. Where nobody knows when those that decode will end, one of them is done
    every `decoding_s / batch` on average, and some wait already.
    """
    facts, before = worker.facts, worker.without_room
    here = max(worker.num_running, worker.num_streams) + before
    if not here:
        return 0.0
    needed = -(-tokens // facts.block_size)
    if here < facts.max_batch and needed * (1 + before) <= worker.free_blocks:
        return 0.0
    if here >= facts.max_batch and worker.seat_in_s is not None:
        return worker.seat_in_s
    return (1 + max(before, here - facts.max_batch)) * decoding_s / max(1, min(here, facts.max_batch - 1))


def local(
    request: RoutableRequest,
    prefill: PrefillCost,
    decode: DecodeCost,
    goals: Goals = NO_GOALS,
    model: CostModel = MEASURED,
) -> Way:
    """Both legs on one worker: the prompt's last step gives the first token."""
    worker = decode.worker
    wait = 0.0 if decode.has_room else decode.first_step_s
    ttft = prefill.queue_s + prefill.prefill_s + wait
    left = 0.0
    if worker.num_passed:  # else nothing is left there when it begins to decode
        left = max(0.0, decode.prompts_s - prefill.queue_s - prefill.prefill_s)
    stalled = decode.stall * left
    return Way(
        prefill,
        decode,
        queue_s=prefill.queue_s,
        handover_s=0.0,
        first_step_s=wait,
        stalled_s=stalled,
        total_s=prefill.cost_s + wait + decode.decode_s + stalled + decode.inflicted_s,
        given_up=_given_up(request, goals, prefill, decode, ttft, left),
        waits_for_room=decode.name if wait > model.patience * prefill.prefill_s else None,
    )


def pair(
    request: RoutableRequest,
    prefill: PrefillCost,
    decode: DecodeCost,
    link: LinkModel,
    goals: Goals = NO_GOALS,
    model: CostModel = MEASURED,
) -> Way:
    """The legs on two workers, and the handover between them. None takes place where the first token is the last."""
    if request.ends_with_prefill:
        return _prefill_alone(request, prefill, decode, goals, model)
    handover = link.handover_s(decode.missing_bytes)
    queue = prefill.queue_s + prefill.room_s
    ttft, pause = queue + prefill.prefill_s, 0.0
    left = max(0.0, decode.prompts_s - ttft - handover)
    stalled, early = decode.stall * left, 0.0
    lacking = None
    if decode.room_s and _waits_for_room(request, prefill, decode, handover, left, goals, model):
        ttft, lacking = ttft + decode.room_s, decode.name
    elif prefill.room_s > model.patience * prefill.prefill_s:
        lacking = prefill.name
    if request.is_first_token_exact:
        pause = handover + decode.first_step_s - decode.room_s
        early = max(0.0, 1 - decode.stall) * pause
        stalled += max(0.0, decode.stall - 1) * pause
    else:
        ttft += handover + decode.first_step_s
    return Way(
        prefill,
        decode,
        queue_s=queue,
        handover_s=handover,
        first_step_s=decode.first_step_s,
        stalled_s=stalled,
        total_s=prefill.cost_s + prefill.room_s + handover + stalled + decode.cost_s - early,
        given_up=_given_up(request, goals, prefill, decode, ttft, left + pause),
        waits_for_room=lacking,
        is_first_early=request.is_first_token_exact,
        early_token_discount_s=early,
    )


def _prefill_alone(
    request: RoutableRequest, prefill: PrefillCost, decode: DecodeCost, goals: Goals, model: CostModel
) -> Way:
    """Of a pair whose prefill worker says all."""
    queue = prefill.queue_s + prefill.room_s
    return Way(
        prefill,
        decode,
        queue_s=queue,
        handover_s=0.0,
        first_step_s=0.0,
        stalled_s=0.0,
        total_s=prefill.cost_s + prefill.room_s,
        given_up=_given_up(request, goals, prefill, decode, queue + prefill.prefill_s, 0.0),
        waits_for_room=prefill.name if prefill.room_s > model.patience * prefill.prefill_s else None,
        is_first_early=True,
    )


def _waits_for_room(
    request: RoutableRequest,
    prefill: PrefillCost,
    decode: DecodeCost,
    handover_s: float,
    left_s: float,
    goals: Goals,
    model: CostModel,
) -> bool:
    """Whether it is better kept in the gateway until its decode worker has room: its KV cache would only take up the
    prefill worker's memory. Unless it does so not for long; or its stream bears the wait after the first token, and the
    prefill worker has memory for it and another one like it, for so long. Where nobody says how far apart tokens may
    be, they may be as far as can be. One that is late for its first token makes way there: seats go in the order in
    which legs come, and those still in time need them.
    """
    room_s = decode.room_s
    if room_s <= model.patience * (prefill.prefill_s + handover_s):
        return False
    itl_s, gaps = request.slo_itl_s or model.pause_steps * decode.gap_s, request.expected_tokens - 1
    if gaps < 1 or not request.is_first_token_exact:
        return True
    sender = prefill.worker
    if goals.makes_way or room_s > sender.keeps_s:
        return True
    if 2 * (request.prompt_tokens - sender.cached_tokens) > sender.free_blocks * sender.facts.block_size:
        return True
    return decode.gap_s + (left_s + handover_s + decode.first_step_s) / gaps > itl_s


def _given_up(
    request: RoutableRequest, goals: Goals, prefill: PrefillCost, decode: DecodeCost, ttft_s: float, stalled_s: float
) -> int:
    """Number of the `Sacrifice`.  stalled_s: how long its own stream will stand still."""
    given_up = 0
    if prefill.pauses:
        given_up = 4 if goals.itl_s is None else 1
    if goals.itl_s is not None:
        gaps = request.expected_tokens - 1
        if prefill.misses_itl or (gaps > 0 and decode.gap_s + stalled_s / gaps > goals.itl_s):
            given_up += 4
    if goals.ttft_s is not None and ttft_s > goals.ttft_s:
        given_up += 2
    return given_up


_SACRIFICES = tuple(Sacrifice)


def can_hand_over(prefill: WorkerView, decode: WorkerView) -> bool:
    return prefill.worker != decode.worker and prefill.handover is not None and prefill.handover == decode.handover


def judge(request: RoutableRequest, chosen: Candidate, view: FleetView) -> Candidate:
    """Another rule's choice, with our predictions. A pair that cannot hand over is served by its decode worker alone.

    Raises:  ValueError if a worker it names is not in `view`.
    """
    decode = _named(view.decode, chosen.decode)
    leg, congested, goals = decode_cost(request, decode), congestion(view), Goals.of(request, view)
    if chosen.prefill is not None and chosen.prefill != chosen.decode:
        prefill = _named(view.prefill, chosen.prefill)
        if can_hand_over(prefill, decode):
            link = view.links.link(prefill.worker, decode.worker)
            return pair(request, prefill_cost(request, prefill, congested), leg, link, goals).candidate()
    return local(request, prefill_cost(request, decode, congested), leg, goals).candidate()


def _named(workers: Sequence[WorkerView], name: WorkerId) -> WorkerView:
    for worker in workers:
        if worker.worker == name:
            return worker
    raise ValueError(f"the policy chose worker {name!r}, which is not among those offered")
