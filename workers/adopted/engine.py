"""An unmodified `vllm serve` as an engine: requests go to its `/inference/v1/generate`, its KV events come by ZMQ.

It is somebody else's process: it was started before us, may serve others too, and goes on when we stop. What it cannot
do is in `docs/adopt.md`.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import structlog

from planes.wire.errors import InvalidRequest
from planes.wire.frames import DecodeLeg, FinishReason, LocalLeg, PrefillLeg, Ticket
from planes.wire.messages import (
    OWN_TOKENS,
    THINKING_BUDGET,
    Adapter,
    EngineFacts,
    HandoverEndpoint,
    KvEvent,
    RequestId,
    Role,
    WorkerId,
)
from workers.adopted.answer import OtherToken
from workers.adopted.conversation import converse
from workers.adopted.examine import TIMEOUT_S, ServerFacts
from workers.adopted.handover import server_layout, transfer_params, write_ticket
from workers.adopted.http import HttpClient, ServerGone
from workers.adopted.metrics import ServerLoad, read_load
from workers.adopted.probe import Probe, probed
from workers.adopted.request import drawn_again, generate_body
from workers.engine.base import (
    AdapterUnusable,
    EngineLoad,
    EngineObserver,
    EngineOutput,
    EngineRequest,
    EngineStartError,
)
from workers.engine.tasks import ActiveRequest, ActiveRequests, LastingWork, cancelled
from workers.vllm.events import EventReader, EventTranslator
from workers.vllm.request import TicketTooOld

_log = structlog.get_logger()

_SILENT_S = 30.0
"""A server that has not answered for so long is given up; one that refuses the connection, at once."""


@dataclass(frozen=True, slots=True)
class AdoptOptions:
    """What the server does not say of itself."""

    worker: WorkerId
    role: Role
    has_handover: bool
    vocab_size: int
    vocabulary: Sequence[bytes]
    """What each token spells."""
    eos: tuple[int, ...]
    max_batch: int
    max_step_tokens: int
    lease_s: int
    bytes_per_token: int
    watch_s: float = 1.0
    """Between two looks at the server's health and load."""
    events_s: float = 10.0
    """How long the KV events of the first prompt may take."""


class Reader(Protocol):
    """What is needed of `workers.vllm.events.EventReader`."""

    async def run(self, on_events: Callable[[list[KvEvent]], None]) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True, eq=False, kw_only=True)
class _ActiveRequest(ActiveRequest):
    num_tokens: int = 0
    """Generated, of all choices; 0: it waits, as far as can be told."""


@dataclass(slots=True)
class _Told:
    """What the server has said last. others: requests of its other clients, as `GET /metrics` count them."""

    load: ServerLoad = field(default_factory=ServerLoad)
    others: int = 0


class AdoptedEngine:
    """See `workers.engine.base.Engine`."""

    def __init__(
        self,
        options: AdoptOptions,
        server: ServerFacts,
        client: HttpClient,
        *,
        make_reader: Callable[..., Reader] = EventReader,
    ) -> None:
        """make_reader: makes what hears KV events, as `EventReader` is made."""
        self._options = options
        self._server = server
        self._client = client
        self._runs = ActiveRequests[_ActiveRequest]()
        self._told = _Told()
        self._lasting = LastingWork(lambda reason: self._observer.died(reason))  # noqa: PLW0108 - `start` brings it
        self._num_groups = 0
        self._make_reader = make_reader
        self._reader: Reader | None = None
        self._has_events = asyncio.Event()
        self._observer: EngineObserver
        self._facts: EngineFacts
        self._endpoint: HandoverEndpoint | None = None
        self._layout = ""

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
        """Its connector is made for one side of a handover or for both (`workers/vllm/config.py`)."""
        return tuple(Role) if self._options.role is Role.BOTH and self._endpoint is not None else ()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self, observer: EngineObserver, *, progress: Callable[[str], None]) -> None:
        """Raises:  EngineStartError."""
        self._observer = observer
        server = self._server
        self._reader = self._make_reader(EventTranslator(server.model), server.replay, publisher=server.events)
        self._lasting.keep(self._reader.run(self._changed))
        progress(f"trying the vLLM server at {self._client.address.netloc}")
        try:
            probe = await probed(
                self._client,
                num_tokens=min(8 * server.block_size, server.context_length // 2),
                vocab_size=min(self._options.vocab_size, len(self._options.vocabulary)),
                has_handover=self._options.has_handover,
                draw=random.Random().randrange,
            )
        except ServerGone as exc:
            raise EngineStartError(f"the vLLM server went away while it was tried: {exc}") from exc
        await self._expect_events()
        if probe.kept is not None:
            self._num_groups = probe.kept.num_groups
            self._endpoint, self._layout = probe.kept.endpoint(server), server_layout(server, self._num_groups)
        self._facts = self._read_facts(probe)
        self._lasting.keep(self._watch())

    async def _expect_events(self) -> None:
        """The probe filled blocks, of which the server has told.  Raises:  EngineStartError."""
        try:
            async with asyncio.timeout(self._options.events_s):
                await self._has_events.wait()
        except TimeoutError:
            raise EngineStartError(
                f"no KV events came from {self._server.events} within {self._options.events_s:g} s of a prompt: can "
                "this machine reach that port, and does the server cache prefixes?"
            ) from None

    def _changed(self, changes: list[KvEvent]) -> None:
        self._has_events.set()
        self._observer.kv_changed(changes)

    def _read_facts(self, probe: Probe) -> EngineFacts:
        options, server = self._options, self._server
        return EngineFacts(
            block_size=server.block_size,
            num_blocks=server.num_blocks,
            context_length=server.context_length,
            max_batch=options.max_batch,
            max_step_tokens=options.max_step_tokens,
            bytes_per_block=options.bytes_per_token * server.block_size,
            vocab_size=options.vocab_size,
            latency=probe.latency,
            lacks=(OWN_TOKENS,) if probe.has_thinking_budget else (OWN_TOKENS, THINKING_BUDGET),
        )

    async def _watch(self) -> None:
        """Until the server is gone: its load, and whether it is well."""
        heard_at = time.monotonic()
        while not self._lasting.is_ending:
            await asyncio.sleep(self._options.watch_s)
            try:
                status, _ = await self._client.ask("GET", "/health", timeout_s=TIMEOUT_S)
                _, exposition = await self._client.ask("GET", "/metrics", timeout_s=TIMEOUT_S)
            except ServerGone as exc:
                silent_s = time.monotonic() - heard_at
                if isinstance(exc.__cause__, OSError) or silent_s > _SILENT_S:
                    self._lasting.died(f"the vLLM server is gone: {exc}")
                continue
            heard_at = time.monotonic()
            if status != 200:
                self._lasting.died(f"the vLLM server's /health says {status}: its engine is dead")
            load = read_load(exposition.decode(errors="replace"))
            self._told = _Told(load, max(0, load.num_running + load.num_waiting - len(self._runs)))

    async def stop(self) -> None:
        """The server goes on; requests of ours that it still has end with their connections."""
        self._lasting.is_ending = True
        await cancelled([*self._runs.tasks, *self._lasting.tasks])
        if self._reader is not None:
            self._reader.close()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest, on_output: Callable[[EngineOutput], None]) -> None:
        self._runs.check(request)
        error, handover = "", None
        try:
            handover = transfer_params(
                request,
                block_size=self._server.block_size,
                num_groups=self._num_groups,
                can_hand_over=self._endpoint is not None,
                now=time.time(),
            )
        except TicketTooOld as exc:
            error = str(exc)
        body = generate_body(request, list(self._options.eos), handover, self._options.vocabulary)
        run = _ActiveRequest(request=request, on_output=on_output, unfinished=set(range(request.sampling.n)))
        self._runs.begin(run, self._runs.refuse(run, error) if error else self._run(run, body))

    async def _run(self, run: _ActiveRequest, body: dict[str, Any]) -> None:
        request = run.request
        try:
            try:
                await self._converse(run, body, skipped=drawn_again(request))
            except OtherToken:
                # The prompt's KV cache is here now, and cached: the client's token is continued without the other's.
                local = replace(request, leg=LocalLeg())
                body = generate_body(local, list(self._options.eos), None, self._options.vocabulary)
                _log.info("handover.other_token", request_id=request.request)
                await self._converse(run, body | {"request_id": f"{request.request}-again"}, skipped=None)
            if run.unfinished:
                self._runs.fail(run, "vLLM ended the request without a reason")
        except InvalidRequest as exc:
            self._runs.fail(run, str(exc), refusal=exc)
        except Exception as exc:  # noqa: BLE001 - whatever the server makes of an answer, the request must be answered
            self._runs.fail(run, f"{type(exc).__name__}: {exc}")
        finally:
            self._runs.ended(run)

    async def _converse(self, run: _ActiveRequest, body: dict[str, Any], *, skipped: int | None) -> None:
        await converse(self._client, run.request, body, partial(self._take, run), skipped=skipped)

    def _take(self, run: _ActiveRequest, outputs: list[EngineOutput], params: dict[str, Any] | None) -> None:
        for output in outputs:
            ticket = self._ticket(run.request, output, params)
            run.num_tokens += len(output.tokens)
            if output.finish is not None:
                run.unfinished.discard(output.index)
            run.on_output(output if ticket is None else replace(output, ticket=ticket))

    def _ticket(self, request: EngineRequest, output: EngineOutput, params: dict[str, Any] | None) -> Ticket | None:
        """None if the request is complete: its first token ended it, or it was to be one token long."""
        if not params or not isinstance(request.leg, PrefillLeg) or output.finish is not FinishReason.LENGTH:
            return None
        return write_ticket(self._options.worker, params, lease_s=self._options.lease_s, now=time.time())

    def abort(self, request: RequestId) -> None:
        """Closing its connection makes vLLM abort it. A KV cache kept for a decode worker stays until its lease ends:
        for vLLM's front end that request has ended, and it forgets the names of those.
        """
        self._runs.abort(request)

    async def load_adapter(self, adapter: Adapter) -> None:
        raise AdapterUnusable(f"a server that was adopted takes no adapters from here, not {adapter.name!r} either")

    async def unload_adapter(self, adapter: Adapter) -> None:
        """None was loaded."""

    def load(self) -> EngineLoad:
        """Ours as they are now, those of the server's other clients as it counted them last."""
        running = [run for run in self._runs if run.num_tokens]
        waiting = [run for run in self._runs if not run.num_tokens]
        return EngineLoad(
            num_running=len(running) + self._told.others,
            num_waiting=len(waiting),
            waiting_prefill_tokens=sum(
                1 if isinstance(run.request.leg, DecodeLeg) else len(run.request.prompt) for run in waiting
            ),
            free_blocks=int(self._facts.num_blocks * (1.0 - self._told.load.usage)),
            kv_tokens=sum(len(run.request.prompt) + run.num_tokens for run in running),
        )
