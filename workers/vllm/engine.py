"""The real engine: vLLM 0.32, embedded through `AsyncLLM`, one engine process per worker, CPU and CUDA alike.

vLLM is imported when the engine starts and nowhere else but in `plugin/`, which runs inside the engine process.
`request.py` says what a request looks like to vLLM, `output.py` what vLLM says of it, `events.py` reads its KV events.
"""

import asyncio
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import structlog

from planes.wire.errors import UNSUPPORTED, InvalidRequest
from planes.wire.frames import DecodeLeg, FinishReason, PrefillLeg, Ticket
from planes.wire.messages import (
    Adapter,
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    LatencyPrior,
    RequestId,
    Role,
    StepSample,
)
from workers.engine.base import EngineLoad, EngineObserver, EngineOutput, EngineRequest, EngineStartError
from workers.engine.tasks import ActiveRequest, ActiveRequests, LastingWork, cancelled
from workers.vllm.adapters import EngineAdapters, lora_request
from workers.vllm.config import CPU_PRIOR, VllmOptions, engine_config
from workers.vllm.cores import pin_threads
from workers.vllm.events import EventReader, EventTranslator
from workers.vllm.failure import cause_of, expect_failure
from workers.vllm.grammars import GrammarTrials, expect_tokenizer, grammar_of, libraries_for
from workers.vllm.layout import vllm_layout
from workers.vllm.leases import Leases
from workers.vllm.output import NO_ARRIVAL, Arrival, translate
from workers.vllm.pooling import (
    NO_VECTORS,
    NOT_MEASURED,
    TASK,
    Pooled,
    VectorFacts,
    check_tasks,
    vector_facts,
    vector_output,
)
from workers.vllm.request import (
    KvGroup,
    TicketTooOld,
    handover_params,
    is_greedy,
    reasoning_arguments,
    sampling_arguments,
    write_ticket,
)
from workers.vllm.requirements import check_model_dir, eos_tokens
from workers.vllm.scratch import Scratch

__all__ = ["VllmEngine", "VllmOptions"]

_log = structlog.get_logger()


@dataclass(slots=True, eq=False, kw_only=True)
class _ActiveRequest(ActiveRequest):
    waiting_tokens: int
    """Prompt tokens that count as not computed; 0 after the first token."""
    given_at: float | None = None
    """When vLLM got it; None: not yet, its grammar is tried."""
    deadline: asyncio.TimerHandle | None = None
    arrival: Arrival = NO_ARRIVAL
    pooled: Pooled = NOT_MEASURED
    is_unheard: bool = True
    """No output of choice 0 has come."""


@dataclass(slots=True)
class _Latest:
    """The engine's last report."""

    num_running: int = 0
    kv_tokens: int = 0
    prefilled: int = 0
    usage: float = 0.0
    groups: list[KvGroup] = field(default_factory=list)


class VllmEngine:
    """See `workers.engine.base.Engine`."""

    def __init__(self, options: VllmOptions) -> None:
        self._options = options
        self._runs = ActiveRequests[_ActiveRequest]()
        self._leases = Leases(options.lease_s, self._abort_leased, call_later=self._call_later)
        self._latest = _Latest()
        self._has_reported = asyncio.Event()
        self._heard_at = 0.0
        self._lasting = LastingWork(lambda reason: self._observer.died(reason))  # noqa: PLW0108 - `start` brings it
        # One thread that lives as long as the engine process: the kernel ties the process to the thread that made it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._scratch = Scratch()
        self._grammars = GrammarTrials(libraries_for=libraries_for)
        self._llm: Any = None
        self._adapters: EngineAdapters
        self._observer: EngineObserver
        self._facts: EngineFacts
        self._endpoint: HandoverEndpoint | None = None
        self._layout = ""
        self._eos: list[int] = []
        self._vectors: VectorFacts = NO_VECTORS
        self._reader: EventReader | None = None

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def endpoint(self) -> HandoverEndpoint | None:
        return self._endpoint

    @property
    def layout(self) -> str:
        return self._layout

    @property
    def roles(self) -> tuple[Role, ...]:
        return self._options.roles

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self, observer: EngineObserver, *, progress: Callable[[str], None]) -> None:
        """Raises:  EngineStartError."""
        options = self._options
        check_model_dir(options.model_path, load_format=options.load_format)
        self._observer = observer
        self._eos = eos_tokens(options.model_path)
        replay_endpoint = f"ipc://{self._scratch.path}/replay"
        self._reader = EventReader(EventTranslator(options.model), replay_endpoint)
        events = {"endpoint": self._reader.endpoint, "replay_endpoint": replay_endpoint}
        expect_failure(self._scratch.path)
        description = expect_tokenizer(self._scratch.path)
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            progress("importing vLLM")
            config = await in_thread(self._thread, engine_config, options, events)
            progress(f"loading {options.model_path.name} into the engine process")
            self._llm = await in_thread(self._thread, self._launch, config)
            self._adapters = EngineAdapters(self._llm)
            self._watch_processes()
            self._lasting.keep(self._reader.run(observer.kv_changed))
            progress("computing a first vector" if options.is_embedding else "computing a first token")
            await self._warm_up()
            if options.cores:
                for pid in self.process_ids:
                    pin_threads(pid, options.cores)
            self._facts = self._read_facts(config)
            if not options.is_embedding:
                self._grammars.start(options.model_path, self._facts.vocab_size, description)
        except EngineStartError:
            raise
        except Exception as exc:  # vLLM raises whatever its parts raise
            raise EngineStartError(f"vLLM could not start: {cause_of(exc)}") from exc
        self._lasting.keep(self._watch_steps())

    def _launch(self, config: Any) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        if self._lasting.is_ending:
            raise EngineStartError("stopped while starting")
        preloaded = os.environ.get("LD_PRELOAD")
        try:
            llm = AsyncLLM.from_vllm_config(config, stat_loggers=[_stat_logger(self._recorded)], disable_log_stats=True)
            llm.input_processor.structured_outputs_config = None  # it would check grammars here, with a tokenizer
            return llm
        finally:
            # vLLM preloads libraries into its engine process through our environment; others are not meant.
            os.environ.pop("LD_PRELOAD", None)
            if preloaded is not None:
                os.environ["LD_PRELOAD"] = preloaded

    async def _warm_up(self) -> None:
        """One token or vector: pages the weights in, and the engine's first report tells its KV cache groups."""
        from vllm import PoolingParams, SamplingParams  # noqa: PLC0415
        from vllm.inputs import tokens_input  # noqa: PLC0415

        prompt, name = tokens_input([0]), "warm-up"
        if self._options.is_embedding:
            check_tasks(self._options.model, await self._llm.get_supported_tasks())
            self._vectors = vector_facts(self._llm.model_config)
            outputs = self._llm.encode(prompt, PoolingParams(task=TASK), name)
        else:
            params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
            outputs = self._llm.generate(prompt, params, name)
        async for _ in outputs:
            pass
        await self._has_reported.wait()  # the report follows the token in the same message

    def _read_facts(self, config: Any) -> EngineFacts:
        from vllm.platforms import current_platform  # noqa: PLC0415

        options = self._options
        if options.handover is not None:
            self._endpoint = HandoverEndpoint(
                mode=options.handover,
                engine_id=config.kv_transfer_config.engine_id,
                host=options.host,
                port=int(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]),
                tp_size=config.parallel_config.tensor_parallel_size,
                pp_size=config.parallel_config.pipeline_parallel_size,
            )
            self._layout = self._read_layout(options.handover)
        return EngineFacts(
            block_size=self._llm.vllm_config.cache_config.block_size,
            num_blocks=self._num_blocks(config.scheduler_config.max_num_seqs),
            context_length=self._llm.model_config.max_model_len,
            max_batch=config.scheduler_config.max_num_seqs,
            max_step_tokens=config.scheduler_config.max_num_batched_tokens,
            # Of a window's layers only the last blocks travel: for long prompts this is an upper bound.
            bytes_per_block=sum(group.block_bytes for group in self._latest.groups),
            vocab_size=self._llm.model_config.get_vocab_size(),
            latency=CPU_PRIOR if current_platform.is_cpu() else LatencyPrior(),
            is_shortest_first=True,
            embedding_size=self._vectors.embedding_size,
            is_matryoshka=self._vectors.is_matryoshka,
            matryoshka_dimensions=self._vectors.matryoshka_dimensions,
        )

    def _num_blocks(self, max_batch: int) -> int:
        """Where no layer keeps any, because prompts are computed in one piece: as many as all that run would fill."""
        cache = self._llm.vllm_config.cache_config
        if not self._latest.groups:
            num_blocks = -(-self._llm.model_config.max_model_len // cache.block_size) * max_batch
        else:
            num_blocks = (cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size) // cache.block_size
        return int(num_blocks)

    def _read_layout(self, mode: HandoverMode) -> str:
        import vllm  # noqa: PLC0415
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NIXL_CONNECTOR_VERSION  # noqa: PLC0415

        return vllm_layout(
            self._llm.vllm_config,
            self._latest.groups,
            version=vllm.__version__,
            connector_version=NIXL_CONNECTOR_VERSION,
            mode=mode,
        )

    @property
    def process_ids(self) -> list[int]:
        """Of the engine process (one per data-parallel rank, so one)."""
        return [process.pid for process in self._llm.engine_core.resources.engine_manager.processes]

    def _watch_processes(self) -> None:
        loop = asyncio.get_running_loop()
        for process in self._llm.engine_core.resources.engine_manager.processes:
            loop.add_reader(process.sentinel, self._process_ended, process.sentinel)

    def _process_ended(self, sentinel: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        self._lasting.died("the engine process ended")

    async def _watch_steps(self) -> None:
        """Notice an engine that is alive but does nothing."""
        limit_s = self._options.step_timeout_s
        while not self._lasting.is_ending:
            await asyncio.sleep(limit_s / 8)
            passed_s = silent_s(self._heard_at, (run.given_at for run in self._runs), now=time.monotonic())
            if passed_s > limit_s:
                self._lasting.died(
                    f"no engine step for {passed_s:.0f} s with {len(self._runs)} requests; the limit is {limit_s} s"
                )

    async def stop(self) -> None:
        self._lasting.is_ending = True
        await cancelled([*self._runs.tasks, *self._lasting.tasks])
        await self._grammars.stop()
        await self._leases.stop()
        if self._llm is None:
            for child in multiprocessing.active_children():  # `start` was cancelled or failed
                child.kill()
        else:
            loop = asyncio.get_running_loop()
            for process in self._llm.engine_core.resources.engine_manager.processes:
                loop.remove_reader(process.sentinel)
            await self._end_output()
            drain_s = float(self._llm.vllm_config.shutdown_timeout)
            await loop.run_in_executor(self._thread, self._llm.shutdown, drain_s)
        if self._reader is not None:
            self._reader.close()
        self._thread.shutdown(wait=False)
        self._scratch.remove()

    async def _end_output(self) -> None:
        """vLLM's task that hands out tokens would take the engine's end for its death, and log so."""
        if (handler := self._llm.output_handler) is not None:
            handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest, on_output: Callable[[EngineOutput], None]) -> None:
        self._runs.check(request)
        self._leases.release(request.request)  # what an earlier attempt left
        handover, error = None, ""
        try:
            handover = self._handover(request)
        except TicketTooOld as exc:
            error = str(exc)
        waits = 1 if isinstance(request.leg, DecodeLeg) else len(request.prompt) + len(request.resume)
        unfinished = set(range(request.sampling.n))
        run = _ActiveRequest(request=request, on_output=on_output, unfinished=unfinished, waiting_tokens=waits)
        self._runs.begin(run, self._runs.refuse(run, error) if error else self._generate(run, handover))

    def _handover(self, request: EngineRequest) -> dict[str, Any] | None:
        """`kv_transfer_params`.  Raises:  InvalidRequest, TicketTooOld."""
        return handover_params(request, self._options.handover, self._latest.groups, now=time.time())

    def _push_timed_out(self, run: _ActiveRequest) -> None:
        if run.waiting_tokens and run in self._runs:
            self._runs.cancel(run)
            self._runs.fail(run, f"no KV cache was written within {self._options.push_timeout_s} s")

    async def _generate(self, run: _ActiveRequest, handover: dict[str, Any] | None) -> None:
        from vllm.exceptions import VLLMValidationError  # noqa: PLC0415
        from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415

        request = run.request
        try:
            relay = self._relay_vector if request.is_embedding else self._relay
            outputs = await self._outputs(request, handover)
            run.given_at = time.monotonic()
            if isinstance(request.leg, DecodeLeg) and self._options.handover is HandoverMode.PUSH:
                loop = asyncio.get_running_loop()
                run.deadline = loop.call_later(self._options.push_timeout_s, self._push_timed_out, run)
            async for output in outputs:
                relay(run, output)
            if run.unfinished:
                self._runs.fail(run, "vLLM ended the request without a reason")
        except InvalidRequest as exc:
            self._runs.fail(run, str(exc), refusal=exc)
        except TicketTooOld as exc:
            self._runs.fail(run, str(exc))
        except VLLMValidationError as exc:
            self._runs.fail(run, str(exc), refusal=InvalidRequest(str(exc), param=exc.parameter, code=UNSUPPORTED))
        except EngineDeadError:
            self._runs.fail(run, "the engine process died")
            self._lasting.died("the engine process died")
        except Exception as exc:  # noqa: BLE001 - vLLM raises whatever its parts raise; the request must be answered
            self._runs.fail(run, f"{type(exc).__name__}: {exc}")
        finally:
            self._runs.ended(run)

    async def _outputs(self, request: EngineRequest, handover: dict[str, Any] | None) -> AsyncIterator[Any]:
        """What vLLM will say of the request.  Raises:  as `_sampling_params`."""
        from vllm import PoolingParams  # noqa: PLC0415
        from vllm.inputs import tokens_input  # noqa: PLC0415

        name, priority, lora = request.request, request.priority, lora_request(request.adapter)
        prompt = tokens_input(request.prompt.tolist(), cache_salt=request.cache_salt or None)
        outputs: AsyncIterator[Any]
        if request.is_embedding:
            outputs = self._llm.encode(prompt, PoolingParams(task=TASK), name, lora_request=lora, priority=priority)
        else:
            params = await self._sampling_params(request, handover)
            more = reasoning_arguments(request)
            outputs = self._llm.generate(prompt, params, name, lora_request=lora, priority=priority, **more)
        return outputs

    async def _sampling_params(self, request: EngineRequest, handover: dict[str, Any] | None) -> Any:
        """vLLM's SamplingParams.  Raises:  InvalidRequest, TicketTooOld; what vLLM raises for what it does not take."""
        from vllm import SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # noqa: PLC0415

        grammar = None
        if request.sampling.structured is not None:
            kind, spec = grammar_of(request.sampling.structured)
            library = await self._grammars.library(kind, spec)
            grammar = StructuredOutputsParams(**{kind: spec})
            grammar._backend = library  # noqa: SLF001 - vLLM's front end would choose it
            handover = self._handover(request)  # the trial may have taken longer than a ticket has
        arguments = sampling_arguments(request, self._eos, handover=handover)
        params = SamplingParams(**arguments, structured_outputs=grammar, output_kind=RequestOutputKind.DELTA)
        params._bad_words_token_ids = request.sampling.bad_words or None  # noqa: SLF001 - vLLM's front end takes texts
        return params

    def _relay(self, run: _ActiveRequest, output: Any) -> None:
        run.waiting_tokens = 0
        if run.deadline is not None:
            run.deadline.cancel()
        for choice in output.outputs:
            indexes = range(run.request.sampling.n) if is_greedy(run.request.sampling) else (choice.index,)
            for index in indexes:
                engine_output = self._translate(run, output, choice, index)
                if engine_output.finish is not None:
                    run.unfinished.discard(index)
                run.on_output(engine_output)

    def _relay_vector(self, run: _ActiveRequest, output: Any) -> None:
        run.waiting_tokens = 0
        run.unfinished.clear()
        run.on_output(vector_output(output, self._vectors, run.pooled))

    def _translate(self, run: _ActiveRequest, output: Any, choice: Any, index: int) -> EngineOutput:
        is_first = run.is_unheard and index == 0
        run.is_unheard = run.is_unheard and not is_first
        translated = translate(run.request, output, choice, index, is_first=is_first, arrival=run.arrival)
        ticket = self._ticket(run, output, translated.finish)
        return translated if ticket is None else replace(translated, ticket=ticket)

    def _ticket(self, run: _ActiveRequest, output: Any, finish: FinishReason | None) -> Ticket | None:
        """None if the request is complete: its first token ended it, or it was to be one token long."""
        leg, params, options = run.request.leg, output.kv_transfer_params, self._options
        if not isinstance(leg, PrefillLeg) or finish is not FinishReason.LENGTH or not params:
            return None
        if leg.mode is HandoverMode.PUSH:
            return Ticket(options.worker, leg.mode, len(run.request.prompt), float(options.lease_s), b"")
        self._leases.keep(run.request.request, params["remote_request_id"])
        return write_ticket(
            options.worker, params, lease_s=options.lease_s, cached_tokens=output.num_cached_tokens, now=time.time()
        )

    async def _abort_leased(self, names: list[str]) -> None:
        await self._llm.engine_core.abort_requests_async(names)

    @staticmethod
    def _call_later(delay: float, callback: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay, callback, *args)

    def abort(self, request: RequestId) -> None:
        """Cancelling its task makes vLLM abort it."""
        self._leases.release(request)
        run = self._runs.abort(request)
        if run is not None and run.deadline is not None:
            run.deadline.cancel()

    # --- what the engine reports --------------------------------------------------------------------------------------

    def _recorded(self, stats: Any, finished: Iterable[Any]) -> None:
        """vLLM's output task calls this after it has passed on a step's tokens, of which nobody has heard yet.

        finished: what it measured of the requests that ended. Of a vector's it tells this way alone.
        """
        self._heard_at = time.monotonic()
        if self._options.is_embedding:
            for measured in finished:
                if (run := self._runs.get(measured.request_id)) is not None:
                    run.pooled = Pooled(measured.queued_time, measured.prefill_time)
        report = (stats.kv_connector_stats or {}).get("headrace") if stats is not None else None
        if report is None:
            return
        latest = self._latest
        latest.num_running, latest.usage = stats.num_running_reqs, stats.kv_cache_usage
        latest.kv_tokens, latest.prefilled = report["kv_tokens"], report["prefilled"]
        if "groups" in report:
            latest.groups = msgspec.convert(report["groups"], list[KvGroup])
            self._has_reported.set()
        for engine_request, seconds, num_bytes in report["handovers"]:
            # vLLM appends "-" and eight hexadecimal digits to our id.
            run = self._runs.get(RequestId(engine_request[:-9]))
            if run is not None:
                run.arrival = Arrival(seconds, num_bytes)
        if "step" in report:
            self._observer.stepped(StepSample(*report["step"]))

    async def load_adapter(self, adapter: Adapter) -> None:
        await self._adapters.load(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        await self._adapters.unload(adapter)

    def load(self) -> EngineLoad:
        latest = self._latest
        waiting = sum(run.waiting_tokens for run in self._runs)
        num_running = min(latest.num_running, len(self._runs))
        return EngineLoad(
            num_running=num_running,
            num_waiting=len(self._runs) - num_running,
            waiting_prefill_tokens=max(waiting - latest.prefilled, 0) if waiting else 0,
            free_blocks=int(self._facts.num_blocks * (1.0 - latest.usage)),
            kv_tokens=latest.kv_tokens if self._runs else 0,
        )


def silent_s(heard_at: float, given_at: Iterable[float | None], *, now: float) -> float:
    """How long an engine with work has said nothing; 0.0 without any.

    Args:  heard_at: its last step.  given_at: when it got each of the requests here; None: it has not got it.
    """
    given = [instant for instant in given_at if instant is not None]
    return now - max(heard_at, min(given)) if given else 0.0


def _stat_logger(record: Callable[[Any, Iterable[Any]], None]) -> type:
    """A statistics logger class for vLLM. It is a Prometheus logger by descent, so that vLLM makes none of its own."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger  # noqa: PLC0415

    class StepRecorder(PrometheusStatLogger):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            del vllm_config
            self.engine_indexes = engine_indexes or [0]

        def record(self, scheduler_stats: Any, iteration_stats: Any = None, *_: Any, **__: Any) -> None:
            record(scheduler_stats, () if iteration_stats is None else iteration_stats.finished_requests)

        def log_engine_initialized(self) -> None:
            pass

    return StepRecorder
