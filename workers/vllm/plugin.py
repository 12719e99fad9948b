"""What runs inside vLLM's engine process: imported there by name, never by the rest of Headrace.

* Two schedulers that add what a step computed to its statistics, keep quiet while they only poll, let no prompt take a
  whole step for itself, and (where no step is scheduled ahead) take in KV caches between two steps.
* NIXL's two connectors under vLLM's own names (vLLM asks for them by name), with their progress thread calmed, the
  model thread's cores restored, the seconds and bytes of every handover noted, and no lease for a finished request.
* The push connector's decode side gives up what nobody writes.
* On CPU, embeddings are packed for matrix products when one is asked for.
* The engine process ends when the worker does, and at once when it has released everything. Its failure leaves a note.

Both sides of vLLM 0.32's internal interfaces are touched here and in `vllm_engine.py` only.
"""

import ctypes
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from itertools import islice, takewhile
from multiprocessing import util
from typing import Any

NIXL_PROGRESS_PAUSE_US = 50_000
"""NIXL's Python API asks for 0: the progress thread then burns a core. At 50 ms an idle engine takes 1.4 % of one, at
5 ms 2.2 %. Handovers are no slower: the engine drives NIXL itself while a transfer or a lease is open (ADR 6)."""

_QUIET_S = 1.0
"""While requests only wait for their KV cache the engine polls every millisecond; it reports once in this time."""


def provide_nixl() -> None:
    """Let `import nixl` find the CUDA-12 wheel, and calm the progress thread of every agent made from now on."""
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # what vLLM sets when it is the first to import NIXL
    if importlib.util.find_spec("nixl") is None:
        if importlib.util.find_spec("nixl_cu12") is None:
            return  # an engine without handovers needs none
        for module in ("", "._bindings", "._api"):
            sys.modules[f"nixl{module}"] = importlib.import_module(f"nixl_cu12{module}")
    binding = importlib.import_module("nixl._api").nixlBind
    base = binding.nixlAgentConfig
    if hasattr(base, "is_calm"):
        return

    class CalmAgentConfig(base):  # type: ignore[misc, valid-type]
        is_calm = True

        @property
        def pthrDelay(self) -> int:  # noqa: N802 - NIXL's name
            return int(base.pthrDelay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:  # noqa: N802
            base.pthrDelay.__set__(self, max(value, NIXL_PROGRESS_PAUSE_US))

    binding.nixlAgentConfig = CalmAgentConfig


provide_nixl()

# After the alias: vLLM looks for NIXL while these are imported.
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector as nixl  # noqa: E402
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.core.sched import async_scheduler, scheduler  # noqa: E402
from vllm.v1.core.sched.request_queue import create_request_queue  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402

from workers.vllm.failure import note_failures  # noqa: E402

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the worker ends, however it ends; Ctrl-C is the worker's to handle."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it ended before we asked
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BeforeLoading:
    """Empty: vLLM imports this module for this worker extension's sake, before it loads the model."""


if multiprocessing.current_process().name.startswith("EngineCore"):
    die_with_parent()
    note_failures()


def pack_when_needed(_: UnquantizedEmbeddingMethod, layer: Any) -> None:
    """vLLM packs the input embeddings too, which are only looked up: 0.7 GB in vain for Gemma 3 270M in float32."""

    def pack(*args: Any) -> Any:
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)  # replaces this function
        return layer.cpu_linear(*args)

    layer.cpu_linear = pack


if current_platform.is_cpu():
    UnquantizedEmbeddingMethod.process_weights_after_loading = pack_when_needed


def _left(request: Request) -> int:
    """Prompt tokens still to be computed; 0: it decodes."""
    return request.num_tokens - request.num_computed_tokens if request.is_prefill_chunk else 0


def _is_new(request: Request) -> bool:
    """Whether its KV cache is somewhere else, and nobody has begun to move it."""
    is_there = (request.kv_transfer_params or {}).get("do_remote_prefill")
    return bool(is_there) and request.status == RequestStatus.WAITING


class _Scheduling:
    """Sends `{"headrace": …}` in the place of the connector's statistics, which nobody reads here.

    No prompt keeps others from their part of a step: vLLM serves sequences in the order in which they came, and gives
    each prompt all that is left.
    """

    running: list[Request]
    waiting: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ctypes.CDLL(None).malloc_trim(0)  # the model is loaded: 5 % of the process are buffers that nobody needs now
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
        is_shorter = bool(prompts) and first is not None and first.num_tokens < min(prompts)
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
        if isinstance(sys.exc_info()[1], SystemExit):
            # Asked to end, and NIXL, the model's workers and the publisher are closed. vLLM and Python would now free
            # their memory object by object, for seconds; the kernel does it at once. So ends a forked child, too.
            util._exit_function()  # type: ignore[attr-defined]  # noqa: SLF001
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def _take_handovers(self) -> list[tuple[str, float, int]]:
        take = getattr(self.connector, "take_handovers", None)  # type: ignore[attr-defined]
        return [] if take is None else take()

    def _running(self) -> dict[str, int]:
        """kv_tokens: context of the running sequences.  prefilled: prompt tokens of unfinished prefills, computed."""
        kv_tokens = prefilled = 0
        for request in self.running:
            computed = request.num_computed_tokens
            kv_tokens += computed
            if computed < request.num_prompt_tokens:
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


class _Handover:
    """What both NIXL connectors need; see the module's docstring."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        # NIXL's worker pins the model thread to the last core of the node: prefill and decode would share it.
        os.sched_setaffinity(0, cores)
        self._started: dict[str, tuple[float, int]] = {}
        self._finished: list[tuple[str, float, int]] = []
        self._group_bytes = [
            group.kv_cache_spec.page_size_bytes
            * (1 if hasattr(group.kv_cache_spec, "kv_cache_specs") else len(group.layer_names))
            for group in kv_cache_config.kv_cache_groups
        ]

    def take_handovers(self) -> list[tuple[str, float, int]]:
        """(engine's request id, seconds, bytes) of the KV caches that have arrived since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params or {}
        is_arriving = bool(params.get("do_remote_prefill"))
        super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[misc]
        if not is_arriving:
            return
        if not num_external_tokens:  # everything is here already
            self._finished.append((request.request_id, 0.0, 0))
            return
        groups = self.connector_scheduler._reqs_need_recv[request.request_id][1]  # type: ignore[attr-defined] # noqa: SLF001
        num_bytes = sum(len(group) * size for group, size in zip(groups, self._group_bytes, strict=False))
        self._started[request.request_id] = (time.monotonic(), num_bytes)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)  # type: ignore[misc]
        for request_id in connector_output.finished_recving or ():
            started_at, num_bytes = self._started.pop(request_id, (0.0, 0))
            if started_at:
                self._finished.append((request_id, time.monotonic() - started_at, num_bytes))

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        self._started.pop(request.request_id, None)
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode") and request.status == RequestStatus.FINISHED_STOPPED and self._may_free():
            # The first token ended the answer: nobody will come for the blocks, and their lease would pin them.
            side = self.connector_scheduler  # type: ignore[attr-defined]
            side._reqs_not_processed.add(request.request_id)  # noqa: SLF001
            side._reqs_need_save.pop(request.request_id, None)  # noqa: SLF001
            return False, None
        return super().request_finished_all_groups(request, block_ids)  # type: ignore[misc]

    def _may_free(self) -> bool:
        return True

    def shutdown(self) -> None:
        side = self.connector_scheduler  # type: ignore[attr-defined]
        if side is not None:
            # A daemon that looks at the event once a second: the end need not wait for it.
            side._stop_event.set()  # noqa: SLF001
            side._nixl_handshake_listener_t = None  # noqa: SLF001
        super().shutdown()  # type: ignore[misc]


class NixlPullConnector(_Handover, nixl.NixlPullConnector):  # type: ignore[misc]
    """vLLM's pull connector."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)


class _PunctualWriter(nixl.NixlPushConnectorWorker):  # type: ignore[misc]
    """Begins no WRITE that the decode engine may have given up (`NixlPushConnector`). Runs on vLLM's writer thread."""

    def _handle_push_reg_notif(self, notif: bytes) -> None:
        super()._handle_push_reg_notif(notif)
        for name, registration in list(self._pending_d_registrations.items()):
            if _is_late(registration):
                del self._pending_d_registrations[name]

    def _do_start_push_kv(self, request_id: str, blocks: Any, registration: dict[str, Any]) -> None:
        if not _is_late(registration):  # else its lease frees the blocks
            super()._do_start_push_kv(request_id, blocks, registration)


_WRITE_UNTIL = "headrace_write_until"


def _is_late(registration: dict[str, Any]) -> bool:
    return bool(time.time() > registration.get(_WRITE_UNTIL, 0.0))


nixl.NixlPushConnectorWorker = _PunctualWriter


class NixlPushConnector(_Handover, nixl.NixlPushConnector):  # type: ignore[misc]
    """vLLM's push connector, whose decode side would wait for a WRITE for ever, its blocks lost.

    | seconds since the decode engine registered | up to T   | T to 2 T                      | from 2 T on      |
    |--------------------------------------------|-----------|-------------------------------|------------------|
    | prefill engine                             | may begin | may end what it has begun     | writes no more   |
    | decode engine                              | waits     | waits; the request has failed | frees the blocks |

    T is `push_timeout_s`. The registration says until when to begin, because an idle prefill engine may leave it unread
    for long: the two clocks must agree within T, less the time that a handshake and a WRITE take.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._timeout_s = float(options["push_registration_timeout"])
        self._registered_at: dict[str, float] = {}  # oldest first

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        registration = self.connector_scheduler._push_pending_registrations.get(request.request_id)  # noqa: SLF001
        if registration is not None:
            registration[_WRITE_UNTIL] = time.time() + self._timeout_s

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        super().start_load_kv(*args, **kwargs)
        now = time.monotonic()
        self._registered_at.update(dict.fromkeys(self._connector_metadata.push_registrations, now))

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        limit = time.monotonic() - 2 * self._timeout_s
        for request_id in [name for name, registered_at in self._registered_at.items() if registered_at < limit]:
            del self._registered_at[request_id]
            self.connector_worker._failed_recv_reqs.put(request_id)  # noqa: SLF001 - vLLM's way to say so
        results = super().get_transfer_results(finished_req_ids)
        for request_id in results.finished_recving:
            self._registered_at.pop(request_id, None)
        return results

    def _may_free(self) -> bool:
        return False  # the decode engine has registered already and waits for the WRITE
