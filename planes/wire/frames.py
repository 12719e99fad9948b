"""What gateway and worker say on a stream (`planes/streams/`): msgpack, one tagged struct per frame.

Token ids travel packed: little-endian uint32 (`pack_tokens`, `unpack_tokens`).
"""

from enum import StrEnum
from typing import NewType

import msgspec
import numpy as np
import numpy.typing as npt

from planes.wire.messages import Adapter, HandoverEndpoint, HandoverMode, RequestId, WorkerId

StreamId = NewType("StreamId", int)
"""Names one request on one connection; chosen by the gateway, never reused while the connection lives."""


def pack_tokens(tokens: list[int] | npt.NDArray[np.uint32]) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Raises:  ValueError if the length is no multiple of four."""
    tokens: list[int] = np.frombuffer(packed, dtype="<u4").tolist()
    return tokens


class FinishReason(StrEnum):
    """Why a choice ended; `stop` and `length` are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class StructuredOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the answer must match; exactly one field is set. The engine masks the tokens that would break it."""

    json_schema: str = ""
    """JSON text of a schema; `{"type": "object"}` for any object."""
    regex: str = ""
    choice: list[str] = []
    grammar: str = ""
    """EBNF or Lark, as the engine's library reads it."""
    structural_tag: str = ""
    """JSON text: free text in which certain tags begin a constrained part, such as a tool call's arguments."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose tokens. Ranges are checked by the gateway; the worker trusts them."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report per token (0: only the token's own); None: no logprobs."""
    n: int = 1
    logit_bias: dict[int, float] = {}
    bad_words: list[list[int]] = []
    """Token sequences of which none may be completed."""
    structured: StructuredOutput | None = None
    prompt_logprobs: int | None = None
    """How many alternatives to report per prompt token, as `logprobs`; such a request is served by one worker."""
    thinking_tokens: int | None = None
    """Most tokens of reasoning; the engine ends it then."""
    is_stop_included: bool = False
    """Whether the answer ends with the stop string that ended it."""
    is_special_skipped: bool = True
    """Whether special tokens are no part of the answer's text."""
    script: bytes = b""
    """Packed tokens that the simulated engine says; no other engine takes any."""


def needs_own_tokens(sampling: Sampling) -> bool:
    """Whether what comes next depends on which tokens are the answer's: going on from them as from a longer prompt
    would give another answer. A repetition penalty is not among it: it counts the prompt's tokens too.
    """
    is_seeded = sampling.seed is not None and sampling.temperature > 0
    has_penalty = bool(sampling.presence_penalty or sampling.frequency_penalty)
    is_bound = sampling.structured is not None or sampling.thinking_tokens is not None or bool(sampling.bad_words)
    return is_seeded or has_penalty or is_bound


class Parsing(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the worker looks for in the generated text, beside the answer's own."""

    tools: bytes = b""
    """JSON list of function tools as in chat completions; b"": no tool call is looked for."""
    tool_choice: str = "auto"
    """auto, none, required, or `function:NAME`."""
    is_parallel: bool = True
    """Whether more than one call may be reported."""
    custom: list[str] = []
    """Names of those tools that take free text: a call's one argument, `input`, is what the client gets."""
    has_reasoning: bool = False
    """Whether reasoning is told apart from the answer."""
    template_kwargs: bytes = b""
    """JSON object: what the chat template was given, which tells some parsers whether the model thinks."""


class Format(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the worker's formatter writes the answer; the gateway passes its bytes on verbatim."""

    kind: str
    """`chat`, `completion`, `response` or `message`: the dialect; `embedding`: the prompt's vector, float32."""
    response_id: str
    model: str
    created: int
    is_streaming: bool = False
    include_usage: bool = False
    echo: str = ""
    """Completions only: the prompt's text, when the client wants it in front of the answer."""
    parsing: Parsing | None = None
    """None: all text is the answer's."""
    has_continuous_usage: bool = False
    """Whether every event tells the usage so far."""
    has_token_ids: bool = False
    """Whether the answer lists token ids, the prompt's too."""
    repeated: bytes = b""
    """JSON object of fields that the answer repeats from the request (`response`, `message`)."""
    is_context_bound: bool = False
    """`message`: an answer of full length fills the context, and would have been allowed more."""


class Ticket(msgspec.Struct, frozen=True):
    """A prefill worker's promise to keep one prompt's KV cache for `lease_s` seconds after it was written."""

    worker: WorkerId
    mode: HandoverMode
    num_tokens: int
    """Prompt tokens whose KV cache is on offer."""
    lease_s: float
    params: bytes
    """What the decode engine needs, as the prefill engine wrote it; opaque to the gateway."""
    cached_tokens: int = 0
    """Prompt tokens that the prefill worker did not have to compute: what the answer's usage says."""


class LocalLeg(msgspec.Struct, frozen=True, tag="local"):
    """Prefill and decode here."""


class PrefillLeg(msgspec.Struct, frozen=True, tag="prefill"):
    """Compute the prompt and one token, keep the KV cache for the decode worker.

    `emit_first` asks for the first token as a formatted event too, because the client may have it at once.
    """

    mode: HandoverMode
    emit_first: bool = False


class DecodeLeg(msgspec.Struct, frozen=True, tag="decode"):
    """Take the prompt's KV cache from a prefill worker, then decode.

    pull: `ticket` is the prefill worker's.  push: `source` names the prefill worker that will WRITE, and the
    request id, the same in both legs, matches the two.
    """

    ticket: Ticket | None = None
    source: HandoverEndpoint | None = None


Leg = LocalLeg | PrefillLeg | DecodeLeg


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Gateway → worker: run this.

    `resume` are tokens that the client has already got (packed): the engine continues after prompt + resume, the
    formatter folds them without emitting. `sampling.max_tokens` counts them in.
    """

    stream: StreamId
    request: RequestId
    prompt: bytes
    sampling: Sampling
    format: Format
    leg: Leg = LocalLeg()
    resume: bytes = b""
    cache_salt: str = ""
    priority: int = 0
    """Lower is sooner."""
    timeout_s: float = 600.0
    """Seconds until the request's deadline, counted from arrival."""
    adapter: Adapter | None = None
    """What changes the model for it; a worker gets only those that it has registered."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Gateway → worker: nobody waits for this any more. A request that ran ends with Done, reason `abort`, which tells
    what it has used; older workers answer nothing.
    """

    stream: StreamId


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Gateway → worker: the KV cache kept for this request, which a prefill leg computed, will not be fetched."""

    request: RequestId


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Either way; the other side answers Pong at once."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to Ping."""


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """Worker → gateway, its first frame where the fleet has a token: prove that you know it."""

    nonce: bytes


class Introduction(msgspec.Struct, frozen=True, tag="introduction"):
    """Gateway → worker, the answer to Challenge: `planes/streams/greeting.py` says what the proof is."""

    nonce: bytes
    proof: bytes


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Worker → gateway, its first frame, or the answer to Introduction: who answers here.

    An address may have passed on to another worker by now.
    """

    worker: WorkerId
    epoch: int
    proof: bytes = b""
    """That this worker knows the token, too."""


class Usage(msgspec.Struct, frozen=True):
    """OpenAI's usage words, and what the worker measured."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float = 0.0
    """Accepted until first scheduled."""
    prefill_s: float = 0.0
    """First scheduled until first token (decode leg: 0)."""
    handover_s: float = 0.0
    """Decode leg: arrival until the KV cache was here."""
    handover_bytes: int = 0
    decode_s: float = 0.0
    """First until last token."""
    reasoning_tokens: int = 0
    """Completion tokens that were reasoning."""


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """One request's news from one engine step: finished bytes for the client, and the token ids behind them."""

    stream: StreamId
    payload: bytes
    tokens: list[int]


class Done(msgspec.Struct, frozen=True, array_like=True):
    """The request ended well. `payload`: the last bytes for the client (for a non-streamed answer: all of them)."""

    stream: StreamId
    reason: FinishReason
    usage: Usage
    payload: bytes = b""
    tokens: list[int] = []
    ticket: Ticket | None = None
    """Prefill leg only; None there means that the request is complete (its first token ended it)."""


class FailureKind(StrEnum):
    """The three branches of `planes/wire/errors.py`."""

    INVALID = "invalid"
    REJECTED = "rejected"
    INTERRUPTED = "interrupted"


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """The request ended badly; nothing more follows."""

    stream: StreamId
    kind: FailureKind
    code: str
    message: str
    param: str | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Worker → gateway: everything one engine step had for this gateway, in this order."""

    deltas: list[Delta] = []
    done: list[Done] = []
    failed: list[Failed] = []


FromGateway = Generate | Cancel | Release | Ping | Pong | Introduction
FromWorker = Step | Ping | Pong | Hello | Challenge
