"""What a worker asks of its engine. `vllm/engine.py` and `sim/engine.py` implement it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from planes.wire.errors import HeadraceError, InvalidRequest
from planes.wire.frames import FinishReason, Leg, LocalLeg, Parsing, PrefillLeg, Sampling, Ticket
from planes.wire.messages import Adapter, EngineFacts, HandoverEndpoint, KvEvent, RequestId, Role, StepSample


class EngineStartError(HeadraceError):
    """The engine cannot start here; the message names the value, the limit and what to do."""

    code = "engine_start"


class AdapterUnusable(HeadraceError):  # noqa: N818 - names what is wrong
    """The engine cannot load a LoRA adapter; the message says why, and what to do."""

    code = "adapter_unusable"


def check_adapter(adapter: Adapter) -> None:
    """Raises:  AdapterUnusable if its directory is none."""
    if not Path(adapter.path, "adapter_config.json").is_file():
        raise AdapterUnusable(f"{adapter.path} is not the directory of an adapter (it has no adapter_config.json)")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as the engine sees it: tokens in, tokens out. `workers.validate.admit` makes it: engines do not check
    lengths and tokens again.

    prompt: the client's prompt, shape (n,), uint32, n >= 1.  resume: tokens generated elsewhere already, which the
    engine treats as part of its input and never reports again.  sampling.max_tokens counts `resume` in.
    """

    request: RequestId
    prompt: npt.NDArray[np.uint32]
    sampling: Sampling
    leg: Leg = field(default_factory=LocalLeg)
    resume: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    is_embedding: bool = False
    """Whether the prompt's vector is wanted, and no answer."""
    adapter: Adapter | None = None
    """What changes the model for it: one that has been loaded."""
    parsing: Parsing | None = None
    """Whether the answer has reasoning, which a grammar and `thinking_tokens` mind; None: it has not."""


def is_drawn_again(leg: Leg, sampling: Sampling, *, num_resumed: int) -> bool:
    """Whether a prefill leg's token is thrown away and the decode worker draws another in its place.

    Then it must not end the request, whatever it is: an end of sequence that counts wherever either of two draws gives
    it comes twice as often. Without randomness, or with one token in all, the first draw is as good as the second.
    """
    is_random = sampling.temperature > 0 and sampling.seed is None
    is_last = sampling.max_tokens - num_resumed <= 1
    return isinstance(leg, PrefillLeg) and not leg.emit_first and is_random and not is_last


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token: its own log probability and the most likely alternatives, best first.

    rank: of the token among all, from 1; None if nobody asked.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one engine step produced for one choice of one request.

    tokens: new token ids, in order.  finish: set on the choice's last output.  stop_reason: the stop token id.
    cached_tokens and the measured seconds are as in `frames.Usage`: what is known by then on the first output of
    choice 0 (a stop string, which the engine does not know, may end it anywhere), everything on its last.
    """

    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    ticket: Ticket | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    handover_s: float = 0.0
    handover_bytes: int = 0
    decode_s: float = 0.0
    error: str = ""
    """With `finish=ERROR`: what went wrong, for the log and the gateway."""
    refusal: InvalidRequest | None = None
    """With `finish=ERROR`: nothing went wrong, the client's request is at fault; only the engine could tell."""
    embedding: bytes = b""
    """With `finish`, where a vector was wanted: its float32 numbers, little-endian; of length 1 if it may be cut."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """On the first output of choice 0, where they were asked for: one for each prompt token, the first of them None."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A glance at the engine, taken for a load report; fields as in `planes.wire.messages.LoadReport`."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_prefill_tokens: int = 0
    free_blocks: int = 0
    kv_tokens: int = 0


class EngineObserver(Protocol):
    """What an engine tells its worker without being asked. Called on the event loop."""

    def kv_changed(self, events: list[KvEvent]) -> None:
        """Blocks came or went; names as in `planes/wire/blocks.py`."""

    def stepped(self, sample: StepSample) -> None:
        """One engine step ended."""

    def died(self, reason: str) -> None:
        """The engine is gone for good; the process should end with this reason."""


class Engine(Protocol):
    """Runs requests. All methods are called on the event loop and none of them blocks it, `start` and `stop` apart."""

    @property
    def facts(self) -> EngineFacts:
        """Valid after `start`."""

    @property
    def endpoint(self) -> HandoverEndpoint | None:
        """Where KV caches are handed over; None if this engine cannot. Valid after `start`."""

    @property
    def layout(self) -> str:
        """Compatibility hash of its KV cache (`workers/engine/layout.py`). Valid after `start`."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """What a worker with this engine can become while it runs; empty: nothing but what it was started as."""

    async def start(self, observer: EngineObserver, *, progress: Callable[[str], None]) -> None:
        """Load everything; `progress` gets a short line for each step that takes long."""

    def submit(self, request: EngineRequest, on_output: Callable[[EngineOutput], None]) -> None:
        """Run `request`. `on_output` is called on the event loop, in order, until every choice has its `finish`.

        Outputs of one engine step arrive within one turn of the loop. Errors of the engine arrive as
        `finish=ERROR`, never as an exception.  Raises: InvalidRequest for handover parameters that must not reach the
        engine: only it can read them.
        """

    def abort(self, request: RequestId) -> None:
        """Forget the request; `on_output` is not called again. Unknown ids are ignored.

        A prefill leg that has just ended with a ticket gives up what the ticket promised, if it still can.
        """

    async def load_adapter(self, adapter: Adapter) -> None:
        """Be ready for requests with it.  Raises:  AdapterUnusable."""

    async def unload_adapter(self, adapter: Adapter) -> None:
        """Forget one that was loaded; no request with it runs."""

    def load(self) -> EngineLoad:
        """A glance at the queue."""

    async def stop(self) -> None:
        """Let prefill leases run out or be taken, within reason, then free everything."""
