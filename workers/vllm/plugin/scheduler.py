"""Two schedulers that add what a step computed to its statistics, keep quiet while they only poll, let no prompt take a
whole step for itself, and (where no step is scheduled ahead) take in KV caches between two steps.

They stand in the place of `vllm.v1.core.sched.scheduler.Scheduler` and `…async_scheduler.AsyncScheduler`.
"""

import time
from collections import deque
from itertools import islice, takewhile
from typing import Any

from vllm.v1.core.sched import async_scheduler, scheduler
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.request import Request, RequestStatus

from workers.vllm.plugin import process
from workers.vllm.plugin.connectors import NixlPullConnector

_QUIET_S = 1.0
"""While requests only wait for their KV cache the engine polls every millisecond; it reports once in this time."""


def _left(request: Request) -> int:
    """Prompt tokens still to be computed; 0: it decodes."""
    return request.num_tokens - request.num_computed_tokens if request.is_prefill_chunk else 0


def _is_new(request: Request) -> bool:
    """Whether its KV cache is somewhere else, and nobody has begun to move it."""
    is_there = (request.kv_transfer_params or {}).get("do_remote_prefill")
    return bool(is_there) and request.status == RequestStatus.WAITING


def _is_ready(request: Request) -> bool:
    """Whether it waits for nothing but its turn: not for a grammar, nor for a KV cache."""
    return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class _Scheduling:
    """Sends `{"headrace": …}` in the place of the connector's statistics, which nobody reads here.

    No prompt keeps others from their part of a step: vLLM serves sequences in the order in which they came, and gives
    each prompt all that is left.
    """

    running: list[Request]
    waiting: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        process.trim_memory()
        self._begun: deque[tuple[Any, float, tuple[int, int, int, int]]] = deque(maxlen=64)
        self._step: tuple[float, tuple[int, int, int, int]] = (0.0, (0, 0, 0, 0))
        self._step_s = 0.0
        self._ended_at = 0.0
        self._was_short = self._was_aside = False
        self._reported_at = 0.0
        self._reported: tuple[Any, ...] = ()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        begun_at = time.monotonic()
        aside = self._share_step()
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.running += aside
        if output.num_scheduled_tokens:
            self._was_short = self.scheduler_config.long_prefill_token_threshold == 1  # type: ignore[attr-defined]
        self._begun.append((output, begun_at, self._composition(output.num_scheduled_tokens)))
        return output

    def _share_step(self) -> list[Request]:
        """Decoding sequences first; then prompts, the one with least left first. One that waits and is shorter passes
        them: they are taken out of `running` for this step, and returned. Whoever's KV cache is here, or could be, gets
        a token in a step that computes next to no prompts. Neither is done in two steps in a row; then, as where not
        all have a seat, prompts share what is left.
        """
        prompts = [left for request in self.running if (left := _left(request))]
        if prompts:
            self.running.sort(key=_left)
        first = self.waiting.peek_request() if self.waiting else None
        is_arriving = bool(self.finished_recving_kv_req_ids) or (first is not None and _is_new(first))  # type: ignore[attr-defined]
        is_shorter = bool(prompts) and first is not None and _is_ready(first) and first.num_tokens < min(prompts)
        num_decoding = len(self.running) - len(prompts)
        aside: list[Request] = []
        threshold = 0  # tokens of each prompt; 0: as many as there are
        if is_arriving and not self._was_short:
            threshold = 1
        elif is_shorter and not is_arriving and not self._was_aside and self._has_seats():
            aside, self.running = self.running[num_decoding:], self.running[:num_decoding]
        elif is_arriving or is_shorter:
            threshold = max(1, (self.max_num_scheduled_tokens - num_decoding) // (len(prompts) + 1))  # type: ignore[attr-defined]
        self._was_aside = bool(aside)
        self.scheduler_config.long_prefill_token_threshold = threshold  # type: ignore[attr-defined]
        return aside

    def _has_seats(self) -> bool:
        """Whether all that wait could run beside all that do."""
        num_running, num_waiting = self.get_request_counts()  # type: ignore[attr-defined]
        return bool(num_running + num_waiting <= self.max_num_running_reqs)  # type: ignore[attr-defined]

    def _composition(self, scheduled: dict[str, int]) -> tuple[int, int, int, int]:
        """prefill_tokens, prefill_pairs, batch, kv_tokens as in `planes.wire.messages.StepSample`."""
        prefill_tokens = pairs = batch = kv_tokens = 0
        for request_id, count in scheduled.items():
            end = self.requests[request_id].num_computed_tokens  # type: ignore[attr-defined] # advanced by schedule()
            if count == 1:
                batch += 1
                kv_tokens += end
            else:
                prefill_tokens += count
                pairs += count * (2 * end - count + 1) // 2
        return prefill_tokens, pairs, batch, kv_tokens

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        """vLLM notes how much of the prompt was cached, and asserts that it was not more than the prompt. Of a resumed
        request the tokens after it may be cached, too.
        """
        hit = super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]
        if request.prefill_stats is not None and hit[1] > request.num_prompt_tokens:
            request.prefill_stats.set(
                num_prompt_tokens=request.num_prompt_tokens,
                num_local_cached_tokens=request.num_prompt_tokens,
                num_external_cached_tokens=0,
            )
            request.num_preemptions = max(request.num_preemptions, 1)  # so that vLLM notes nothing more
        return hit

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """vLLM passes over requests that have finished. Those whose KV cache still waits to be fetched give it up."""
        release = getattr(self.connector, "release", None)  # type: ignore[attr-defined]
        if release is not None and request_ids is not None:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            for request_id in request_ids:
                request = self.requests.get(request_id)  # type: ignore[attr-defined]
                if request is not None and request.is_finished():
                    release(request_id)
        return super().finish_requests(request_ids, finished_status)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        while self._begun:
            output, begun_at, composition = self._begun.popleft()
            if output is scheduler_output:
                self._step = (begun_at, composition)
                break
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is None:
            return None
        now = time.monotonic()
        (begun_at, composition), self._step = self._step, (0.0, (0, 0, 0, 0))
        handovers = self._take_handovers()
        glance = (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs, stats.kv_cache_usage)
        is_empty = not (composition[0] or composition[2])
        if is_empty and not handovers and glance == self._reported and now - self._reported_at < _QUIET_S:
            return None
        report: dict[str, Any] = {"handovers": handovers} | self._running()
        if not self._reported:
            report["groups"] = self._groups()
        if not is_empty:
            self._step_s = now - max(begun_at, self._ended_at)
            report["step"] = (*composition, self._step_s)
            self._ended_at = now
        self._reported, self._reported_at = glance, now
        stats.kv_connector_stats = {"headrace": report}
        return stats

    def shutdown(self) -> None:
        super().shutdown()  # type: ignore[misc]
        process.leave_at_once()

    def _take_handovers(self) -> list[tuple[str, float, int]]:
        take = getattr(self.connector, "take_handovers", None)  # type: ignore[attr-defined]
        return [] if take is None else take()

    def _running(self) -> dict[str, int]:
        """kv_tokens: context of the running sequences.  prefilled: prompt tokens of unfinished prefills, computed."""
        kv_tokens = prefilled = 0
        for request in self.running:
            computed = request.num_computed_tokens
            kv_tokens += computed
            if request.is_prefill_chunk:
                prefilled += computed
        return {"kv_tokens": kv_tokens, "prefilled": prefilled}

    def _groups(self) -> list[tuple[int, int, int]]:
        """For every KV cache group: bytes per block over all its layers, tokens per block, window (0: everything)."""
        groups = []
        for group in self.kv_cache_config.kv_cache_groups:  # type: ignore[attr-defined]
            spec = group.kv_cache_spec
            num_pages = 1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names)
            window = getattr(spec, "sliding_window", None) or 0
            groups.append((spec.page_size_bytes * num_pages, spec.block_size, window))
        return groups


_PATIENCE_STEPS, _PATIENCE_S = 0.25, 0.05
"""How long running sequences wait for the KV caches of new requests, at most, in steps and in seconds. A chat's takes
0.01 to 0.04 s on CPU, a step 0.16."""


class Scheduler(_Scheduling, scheduler.Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, which also takes in handed-over KV caches between two steps.

    vLLM admits a request in one step, begins its transfer when that has been computed, and computes its token in the
    next. Where steps are long, one without any tokens before, which begins the transfer, saves a whole one.
    """

    current_step: int
    kv_holding_waiting: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaited: list[Request] = []
        self._wait_until = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        self._wait_until = self._wait_until or now + min(_PATIENCE_S, _PATIENCE_STEPS * self._step_s)
        if now < self._wait_until:
            new = self._next_new()
            self._awaited += new
            if new or self._is_awaiting():
                return self._begin_transfers(new, *args, **kwargs)
        self._awaited, self._wait_until = [], 0.0
        return super().schedule(*args, **kwargs)

    def _next_new(self) -> list[Request]:
        """Whom vLLM would admit next, as far as their KV cache is elsewhere; nobody overtakes, or is asked twice."""
        num_seats = self.max_num_running_reqs - len(self.running) - len(self.kv_holding_waiting)
        if num_seats <= 0 or not (self.waiting and _is_new(self.waiting.peek_request())):
            return []
        new = list(islice(takewhile(_is_new, self.waiting), num_seats))
        return [] if new[0] in self._awaited else new

    def _is_awaiting(self) -> bool:
        arrived = self.finished_recving_kv_req_ids
        return isinstance(self.connector, NixlPullConnector) and any(
            request.status == RequestStatus.WAITING_FOR_REMOTE_KVS and request.request_id not in arrived
            for request in self._awaited
        )

    def _begin_transfers(self, requests: list[Request], *args: Any, **kwargs: Any) -> Any:
        """A step that admits these requests, which wait, and computes nothing."""
        current_step, waiting, holding = self.current_step, self.waiting, self.kv_holding_waiting
        waiting.remove_requests(requests)
        self.waiting, self.kv_holding_waiting = create_request_queue(self.policy), create_request_queue(self.policy)
        for request in requests:
            self.waiting.add_request(request)
        self.current_step = min(current_step, -2)  # running sequences have their turn from step 0 on
        try:
            return super().schedule(*args, **kwargs)
        finally:
            for queue, left in ((waiting, self.waiting), (holding, self.kv_holding_waiting)):
                for request in left:
                    queue.add_request(request)
            self.current_step, self.waiting, self.kv_holding_waiting = current_step, waiting, holding


class AsyncScheduler(_Scheduling, async_scheduler.AsyncScheduler):  # type: ignore[misc]
    """The one that vLLM uses where it schedules a step ahead (CUDA)."""
