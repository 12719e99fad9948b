"""The spans of one request, told from its timeline, in the words of OpenTelemetry's GenAI conventions.

chat sim                       the whole request: server, attributes gen_ai.*, an event for each interruption
├── prepare
├── queue
├── wait prefill-1
├── prefill prefill-1
├── handover prefill-1 → decode-1
└── decode decode-1
"""

from collections.abc import Iterator, Mapping
from typing import Final

from msgspec import Struct

from app.serving.request import GatewayRequest
from router.timeline import Stage, Timeline

Value = str | int | float | bool

_OPERATIONS: Final = {"completion": "text_completion", "embedding": "embeddings"}
"""All others are `chat`."""


class SpanEvent(Struct, frozen=True):
    name: str
    at_s: float
    attributes: dict[str, Value]


class SpanDraft(Struct, frozen=True):
    """Seconds are since the request came."""

    name: str
    begin_s: float
    end_s: float
    attributes: dict[str, Value]
    events: tuple[SpanEvent, ...] = ()
    error: str = ""
    """A code; empty: all went well."""


def request_span(request: GatewayRequest, timeline: Timeline) -> SpanDraft:
    """The root."""
    sampling, operation = request.sampling, _OPERATIONS.get(request.format.kind, "chat")
    told: dict[str, Value | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": request.model,
        "gen_ai.request.stream": request.format.is_streaming,
        "gen_ai.request.max_tokens": sampling.max_tokens or None,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
        "gen_ai.response.id": request.format.response_id,
        "gen_ai.response.model": request.model,
        "gen_ai.response.time_to_first_chunk": timeline.ttft_s,
        "gen_ai.usage.input_tokens": timeline.prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": timeline.cached_tokens,
        "headrace.request_id": str(request.request),
        "headrace.tenant": request.tenant or None,
        "headrace.policy": timeline.policy or None,
        "headrace.prefill": timeline.prefill,
        "headrace.decode": timeline.decode,
        "headrace.overhead_s": timeline.overhead_s,
    }
    error = "" if timeline.code == "ok" else timeline.code
    if error:
        told["error.type"] = error
    return SpanDraft(f"{operation} {request.model}", 0.0, timeline.end_s, _known(told), tuple(_events(timeline)), error)


def stage_spans(timeline: Timeline) -> list[SpanDraft]:
    """Its children."""
    return [
        SpanDraft(
            _name(stage),
            stage.begin_s,
            stage.end_s,
            _known(
                {
                    "headrace.stage": stage.kind.value,
                    "headrace.attempt": stage.attempt,
                    "headrace.worker": stage.worker,
                    "headrace.source": stage.source,
                    "headrace.tokens": stage.tokens or None,
                    "headrace.cached_tokens": stage.cached_tokens or None,
                    "headrace.bytes": stage.num_bytes or None,
                }
            ),
        )
        for stage in timeline.stages
    ]


def _name(stage: Stage) -> str:
    places = [place for place in (stage.source, stage.worker) if place]
    return f"{stage.kind} {' → '.join(places)}".strip()


def _events(timeline: Timeline) -> Iterator[SpanEvent]:
    if timeline.ttft_s is not None:
        yield SpanEvent("first_token", timeline.ttft_s, {})
    for each in timeline.interruptions:
        told: dict[str, Value | None] = {
            "headrace.attempt": each.attempt,
            "error.type": each.code,
            "headrace.worker": each.worker,
        }
        yield SpanEvent("migration" if each.is_migration else "retry", each.at_s, _known(told))


def _known(told: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: value for name, value in told.items() if value is not None}
