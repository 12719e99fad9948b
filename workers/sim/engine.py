"""The simulated engine: `SimCore` in real time, with real KV bytes between engines.

It computes nothing, but everything around it is real: steps take the time that `SimOptions.speed` says, blocks come and
go with events, prompts are handed over by NIXL, and every token is a function of the whole context (`tokens.py`),
on the decode side of the bytes that arrived. Tokens are letters and spaces. Temperature, top_p and the penalties have
no effect; `seed` and the choice's index pick the stream, `stop_token_ids`, `min_tokens` and `ignore_eos` are obeyed.
A scripted answer, or one that must match a JSON Schema or one of some texts, is said as it was told (`script.py`).

One timer runs the steps. An idle engine has none.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import msgspec
import numpy as np
import structlog

from planes.wire.blocks import name_blocks, root
from planes.wire.errors import InvalidRequest
from planes.wire.frames import DecodeLeg, FinishReason, PrefillLeg, Ticket
from planes.wire.messages import Adapter, EngineFacts, HandoverEndpoint, HandoverMode, RequestId, Role
from workers.engine.base import (
    EngineLoad,
    EngineObserver,
    EngineOutput,
    EngineRequest,
    EngineStartError,
    TokenLogprob,
    check_adapter,
    is_drawn_again,
)
from workers.engine.layout import layout_hash
from workers.sim.core import EngineQueueFull, SimCore, SimOutput, SimRequest
from workers.sim.embedding import embedding_of
from workers.sim.handover import KvTransfer, Offer
from workers.sim.kv_pool import KvPool
from workers.sim.options import SimOptions, faster
from workers.sim.request import leg_of
from workers.sim.script import script_of
from workers.sim.side_channel import HandoverFailed
from workers.sim.tokens import key_of, logprob_of, prompt_logprobs_of
from workers.sim.transfer import open_transfer

__all__ = ["SimEngine", "SimOptions"]

_log = structlog.get_logger()

_HANDOVER_VERSION = 1
"""Of what engines tell each other about a handover; another one cannot be read."""

OnOutput = Callable[[EngineOutput], None]


class TransferFactory(Protocol):
    """What `workers.sim.transfer.open_transfer` is."""

    def __call__(
        self, pool: KvPool, *, mode: HandoverMode, engine_id: str, host: str, bind_host: str = ""
    ) -> KvTransfer: ...


@dataclass(slots=True, eq=False)
class _ActiveRequest:
    """One request."""

    request: EngineRequest
    on_output: OnOutput
    choices: dict[RequestId, "_Choice"] = field(default_factory=dict)
    """Those that have not finished, by the core's ids."""
    source: Offer | HandoverEndpoint | None = None
    handover: asyncio.Task[None] | None = None
    is_prompt_told: bool = False
    """Whether an output has had the prompt's log probabilities."""


@dataclass(slots=True, eq=False)
class _Choice:
    """One of a request's answers."""

    run: _ActiveRequest
    index: int
    on_output: OnOutput
    plain: dict[tuple[int, ...], EngineOutput] | None
    """Finished values for the many outputs that are nothing but a token; None if tokens carry logprobs."""


@dataclass(slots=True, eq=False)
class _Lease:
    sequence: RequestId
    timer: asyncio.TimerHandle


class SimEngine:
    """`workers.engine.base.Engine` without a model."""

    def __init__(self, options: SimOptions, *, make_transfer: TransferFactory = open_transfer) -> None:
        """Raises:  EngineStartError for options that make no engine."""
        self._options = options
        self._make_transfer = make_transfer
        self._facts = msgspec.structs.replace(options.facts, latency=faster(options.facts.latency, options.speedup))
        self._speed = faster(options.speed or options.facts.latency, options.speedup)
        self._engine_id = f"{options.worker}-{secrets.token_hex(4)}"  # new at every start
        self._transfer: KvTransfer | None = None
        self._runs: dict[RequestId, _ActiveRequest] = {}
        self._choices: dict[RequestId, _Choice] = {}
        self._leases: dict[RequestId, _Lease] = {}
        self._handovers: set[asyncio.Task[None]] = set()
        self._plain: dict[int, dict[tuple[int, ...], EngineOutput]] = {}
        self._serial = 0
        self._timer: asyncio.Handle | None = None
        self._is_stopped = False
        self._lease_ended = asyncio.Event()

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def endpoint(self) -> HandoverEndpoint | None:
        return None if self._transfer is None else self._transfer.endpoint

    @property
    def roles(self) -> tuple[Role, ...]:
        return () if self._transfer is None else tuple(Role)

    @property
    def layout(self) -> str:
        facts = self._facts
        return layout_hash(
            {
                "engine": "sim",
                "handover_version": _HANDOVER_VERSION,
                "block_size": facts.block_size,
                "bytes_per_block": facts.bytes_per_block,
            }
        )

    async def start(self, observer: EngineObserver, *, progress: Callable[[str], None]) -> None:
        """Raises:  EngineStartError."""
        options, facts = self._options, self._facts
        self._loop = asyncio.get_running_loop()
        self._observer = observer
        try:
            pool = None if options.handover is None else KvPool(facts.num_blocks, facts.bytes_per_block)
            self._core = SimCore(
                facts, self._speed, model=options.model, on_events=observer.kv_changed, seed=options.seed, memory=pool
            )
            if pool is not None and options.handover is not None:
                progress("opening the KV cache for handovers")
                self._transfer = self._make_transfer(
                    pool,
                    mode=options.handover,
                    engine_id=self._engine_id,
                    host=options.host,
                    bind_host=options.bind_host,
                )
                await self._transfer.start()
        except (ValueError, OSError, MemoryError) as exc:
            raise EngineStartError(f"the simulated engine cannot start: {exc}") from exc

    async def stop(self) -> None:
        """Wait for leases to be taken or to run out, then end everything."""
        while self._leases:
            self._lease_ended.clear()
            await self._lease_ended.wait()
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for request in list(self._runs):
            self.abort(request)
        await asyncio.gather(*self._handovers, return_exceptions=True)
        if self._transfer is not None:
            await self._transfer.stop()

    async def load_adapter(self, adapter: Adapter) -> None:
        """It reads no weights. An adapter's text is the model's own under other block names."""
        check_adapter(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        """There is nothing to forget."""

    def load(self) -> EngineLoad:
        return self._core.load()

    def set_slowdown(self, factor: float) -> None:
        """From the next step on, steps take `factor` times as long."""
        self._core.set_slowdown(factor, now=self._loop.time())

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest, on_output: OnOutput) -> None:
        """See `workers.engine.base.Engine.submit`."""
        if request.is_embedding:
            on_output = partial(_embedded, on_output, request)
        run = _ActiveRequest(request, on_output)
        run.source = self._source(request)
        sequences = self._sequences(run)
        now = self._loop.time()
        try:
            for sequence in sequences:
                self._core.submit(sequence, now=now)
        except EngineQueueFull as exc:
            for sequence in sequences:
                self._core.abort(sequence.request, now=now)
            output = EngineOutput(0, (), finish=FinishReason.ERROR, error=str(exc))
            self._loop.call_soon(on_output, output)
            return
        self._runs[request.request] = run
        self._choices.update(run.choices)
        self._begin_handovers()
        self._wake()

    def _source(self, request: EngineRequest) -> Offer | HandoverEndpoint | None:
        """Where a decode leg's KV cache comes from.  Raises: InvalidRequest."""
        leg = request.leg
        if not isinstance(leg, PrefillLeg | DecodeLeg):
            return None
        if self._transfer is None:
            raise InvalidRequest("this worker's engine hands no KV cache over", param="leg")
        if request.sampling.n > 1:
            raise InvalidRequest(f"n is {request.sampling.n}: a handover serves one choice", param="n")
        if isinstance(leg, PrefillLeg):
            return None
        if leg.ticket is None:
            if leg.source is None:
                raise InvalidRequest("a decode leg names neither a ticket nor a source", param="leg")
            return leg.source
        offer = self._transfer.parse(leg.ticket.params)
        num_blocks = -(-leg.ticket.num_tokens // self._facts.block_size)
        if leg.ticket.num_tokens < 1 or offer.num_blocks != num_blocks:
            message = f"the ticket is for {leg.ticket.num_tokens} tokens and names {offer.num_blocks} blocks"
            raise InvalidRequest(message, param="ticket")
        return offer

    def _sequences(self, run: _ActiveRequest) -> list[SimRequest]:
        """What the core runs: one sequence a choice."""
        request, sampling, options = run.request, run.request.sampling, self._options
        tokens = request.prompt
        if request.resume:
            tokens = np.concatenate((tokens, np.array(request.resume, dtype=np.uint32)))
        adapter = request.adapter
        root_name = root(options.model, request.cache_salt, "" if adapter is None else adapter.tag)
        names = name_blocks(tokens, self._facts.block_size, root_name)
        leg, remote_tokens = leg_of(request.leg, len(tokens))
        script = script_of(sampling, vocab_size=self._facts.vocab_size)
        is_ending = not is_drawn_again(request.leg, sampling, num_resumed=len(request.resume))
        sequences = []
        for index in range(sampling.n):
            self._serial += 1
            sequence = RequestId(f"{request.request}/{self._serial}")
            plain = None if sampling.logprobs is not None else self._plain.setdefault(index, {})
            run.choices[sequence] = _Choice(run, index, run.on_output, plain)
            sequences.append(
                SimRequest(
                    request=sequence,
                    prompt_tokens=len(request.prompt),
                    names=names,
                    max_tokens=sampling.max_tokens,
                    resume_tokens=len(request.resume),
                    leg=leg,
                    remote_tokens=remote_tokens,
                    priority=request.priority,
                    tokens=tokens,
                    root=root_name,
                    key=key_of(sampling.seed, index),
                    stop_tokens=frozenset(sampling.stop_token_ids if is_ending else ()),
                    min_tokens=sampling.min_tokens,
                    script=script,
                    natural_tokens=options.answer_tokens if is_ending and not sampling.ignore_eos else 0,
                )
            )
        return sequences

    def abort(self, request: RequestId) -> None:
        """See `workers.engine.base.Engine.abort`."""
        self._end_lease(request)
        run = self._runs.pop(request, None)
        if run is None:
            return
        self._give_up(run.request)
        if isinstance(run.source, Offer) and self._transfer is not None:
            self._start_handover(self._decline(run.source, request, run.handover, self._transfer))
        for sequence in run.choices:
            del self._choices[sequence]
            if run.handover is not None:  # bytes may be on their way: the blocks are free when that has ended
                run.handover.add_done_callback(partial(self._forget, sequence))
                run.handover.cancel()
            else:
                self._forget(sequence)

    def _forget(self, sequence: RequestId, _task: object = None) -> None:
        self._core.abort(sequence, now=self._loop.time())
        self._wake()

    # --- steps ---------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Something changed: if no step is in progress, begin one in the next turn, with all that came in this one."""
        if self._timer is None and not self._is_stopped:
            self._timer = self._loop.call_soon(self._begin)

    def _begin(self, start: float | None = None) -> None:
        self._timer = None
        duration_s = self._core.begin_step(now=self._loop.time() if start is None else start)
        self._begin_handovers()
        if duration_s is not None and self._core.busy_until is not None:
            self._timer = self._loop.call_at(self._core.busy_until, self._end)

    def _end(self) -> None:
        """A step ended: hand out what it gave, and go on. Steps begin where the last one should have ended, so that a
        busy event loop makes tokens late, not the engine slow; unless it is late by more than a step.
        """
        end, now = self._core.busy_until or 0.0, self._loop.time()
        outputs = self._core.end_step(now=now)
        sample = self._core.last_sample
        try:
            for output in outputs:
                choice = self._choices.get(output.request)
                if choice is not None:  # else aborted, perhaps just now by somebody who got another output
                    self._deliver(choice, output)
            if sample is not None:
                self._observer.stepped(sample)
        finally:
            is_late = sample is None or now - end > sample.duration_s
            if not self._is_stopped:
                self._begin(now if is_late else end)

    def _deliver(self, choice: _Choice, output: SimOutput) -> None:
        if output.finish is not None:
            self._finish(choice, output)
        elif choice.plain is None or output.report is not None:
            choice.on_output(self._translate(choice, output))
        else:
            plain = choice.plain.get(output.tokens)
            if plain is None:
                plain = choice.plain[output.tokens] = EngineOutput(choice.index, output.tokens)
            choice.on_output(plain)

    def _translate(self, choice: _Choice, output: SimOutput, ticket: Ticket | None = None) -> EngineOutput:
        num_top, report = choice.run.request.sampling.logprobs, output.report
        logprobs = () if num_top is None else (logprob_of(output.tokens[0], output.entropy, num_top),)
        if choice.index or report is None:
            return EngineOutput(choice.index, output.tokens, logprobs, finish=output.finish)
        return EngineOutput(
            choice.index,
            output.tokens,
            logprobs,
            output.finish,
            ticket=ticket,
            cached_tokens=report.cached_tokens,
            queue_s=max(0.0, report.queue_s),
            prefill_s=max(0.0, report.prefill_s),
            handover_s=max(0.0, report.handover_s),
            handover_bytes=report.handover_blocks * self._facts.bytes_per_block,
            decode_s=max(0.0, report.decode_s),
            prompt_logprobs=self._prompt_logprobs(choice.run),
        )

    def _prompt_logprobs(self, run: _ActiveRequest) -> tuple[TokenLogprob | None, ...]:
        """With the first output alone."""
        num_top = run.request.sampling.prompt_logprobs
        if num_top is None or run.is_prompt_told:
            return ()
        run.is_prompt_told = True
        return prompt_logprobs_of(run.request.prompt.tolist(), num_top)

    def _finish(self, choice: _Choice, output: SimOutput) -> None:
        """The last output of a choice."""
        run = choice.run
        del self._choices[output.request], run.choices[output.request]
        if not run.choices:
            del self._runs[run.request.request]
        choice.on_output(self._translate(choice, output, self._ticket(run.request, output)))

    # --- handover: prefill side ----------------------------------------------------------------------------------

    def _ticket(self, request: EngineRequest, output: SimOutput) -> Ticket | None:
        transfer, options = self._transfer, self._options
        if not isinstance(request.leg, PrefillLeg) or transfer is None:
            return None
        if output.finish is not FinishReason.LENGTH:
            self._give_up(request)
            return None
        self._end_lease(request.request)
        timer = self._loop.call_later(options.lease_s, self._expire, request.request)
        self._leases[request.request] = _Lease(output.request, timer)
        blocks = self._core.blocks_of(output.request)
        params = transfer.offer(request.request, blocks, partial(self._release, request.request))
        num_tokens = len(request.prompt) + len(request.resume)
        return Ticket(options.worker, transfer.endpoint.mode, num_tokens, options.lease_s, params)

    def _give_up(self, request: EngineRequest) -> None:
        """There will be no KV cache of a prefill leg: tell a decode worker that may be waiting for a push."""
        if isinstance(request.leg, PrefillLeg) and self._transfer is not None:
            self._transfer.withdraw(request.request)

    def _expire(self, request: RequestId) -> None:
        _log.warning("lease.expired", request_id=request, lease_s=self._options.lease_s)
        self._end_lease(request)
        lease = self._leases.get(request)
        if lease is not None:  # its blocks are being read this moment
            lease.timer = self._loop.call_later(1.0, self._expire, request)

    def _end_lease(self, request: RequestId) -> None:
        if request in self._leases and self._transfer is not None and self._transfer.withdraw(request):
            self._release(request)

    def _release(self, request: RequestId) -> None:
        """The KV cache was taken, or nobody wants it."""
        lease = self._leases.pop(request, None)
        if lease is not None:
            lease.timer.cancel()
            self._core.release_lease(lease.sequence, now=self._loop.time())
            self._lease_ended.set()
            self._wake()

    # --- handover: decode side -----------------------------------------------------------------------------------

    def _begin_handovers(self) -> None:
        for sequence in self._core.take_admitted():
            run = self._choices[sequence].run
            run.handover = self._start_handover(self._hand_over(run, sequence))

    def _start_handover(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._handovers.add(task)
        task.add_done_callback(self._handovers.discard)
        return task

    async def _decline(
        self, offer: Offer, request: RequestId, handover: asyncio.Task[None] | None, transfer: KvTransfer
    ) -> None:
        """Tell the prefill worker that what it keeps is not wanted, once nothing is being read any more."""
        if handover is not None:
            await asyncio.wait([handover])
        try:
            await transfer.receive(offer, request, (), offer.num_blocks, timeout_s=self._options.handover_timeout_s)
        except HandoverFailed as exc:
            _log.debug("handover.not_declined", request_id=request, reason=str(exc))  # the lease will end it

    async def _hand_over(self, run: _ActiveRequest, sequence: RequestId) -> None:
        """Get the missing blocks. That takes the simulated time at least; when pulling, the real one is part of it."""
        source, transfer = run.source, self._transfer
        if source is None or transfer is None:
            return
        begun, missing = self._loop.time(), self._core.missing_blocks(sequence)
        total = source.num_blocks if isinstance(source, Offer) else -(-_num_tokens(run) // self._facts.block_size)
        blocks = self._core.blocks_of(sequence)[total - missing : total]
        seconds = (
            self._speed.handover_fixed_s + missing * self._facts.bytes_per_block / self._speed.handover_bytes_per_s
        )
        timeout_s = self._options.handover_timeout_s
        try:
            await transfer.receive(source, run.request.request, blocks, total, timeout_s=timeout_s)
        except HandoverFailed as exc:
            if self._runs.get(run.request.request) is run:  # else it was aborted in the same turn
                run.handover = None
                self.abort(run.request.request)
                run.on_output(EngineOutput(0, (), finish=FinishReason.ERROR, error=str(exc)))
            return
        is_pull = isinstance(source, Offer)
        await asyncio.sleep(seconds - (self._loop.time() - begun if is_pull else 0.0))
        run.handover = run.source = None
        self._core.handover_arrived(sequence, now=self._loop.time())
        self._wake()


def _num_tokens(run: _ActiveRequest) -> int:
    return len(run.request.prompt) + len(run.request.resume)


def _embedded(on_output: OnOutput, request: EngineRequest, output: EngineOutput) -> None:
    """The prompt was computed as any is; its one token is nobody's, and the vector takes its place."""
    if output.finish in (FinishReason.STOP, FinishReason.LENGTH):
        output = replace(output, tokens=(), finish=FinishReason.STOP, embedding=embedding_of(request.prompt))
    on_output(output)
