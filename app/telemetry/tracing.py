"""Which requests are traced, and where their spans go: to an OTLP collector, over HTTP.

This is the one module that knows OpenTelemetry's SDK, and only a gateway with `--otlp-endpoint` imports it. Spans are
made whole, at the end of a request, with begin and end; the SDK's processor sends them in a thread of its own, and
drops what a collector that is away cannot take.
"""

import random
from collections.abc import Callable
from typing import Protocol

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from app.serving.request import GatewayRequest
from app.telemetry.spans import SpanDraft, request_span, stage_spans
from app.telemetry.trace_context import TraceContext
from router.timeline import Timeline

_TIMEOUT_S = 5.0
"""Longest that one batch may take, and so the end of the process."""
_TRACE_BITS, _SPAN_BITS = 128, 64


class Spans(Protocol):
    """What takes them: `BatchSpanProcessor`."""

    def on_end(self, span: ReadableSpan) -> None: ...
    def shutdown(self) -> None: ...


class Tracing:
    """Traces requests. ratio: share of requests without a client's trace that are sampled.

    clock: of timelines.  wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        spans: Spans,
        resource: Resource,
        *,
        ratio: float,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._spans = spans
        self._resource = resource
        self._ratio = ratio
        self._clock = clock
        self._wall_clock = wall_clock
        self._rng = rng
        self._scope = InstrumentationScope("headrace")

    def started(self) -> TraceContext:
        """The trace of a request whose client has none."""
        return TraceContext(f"{self._new_id(_TRACE_BITS):032x}", is_sampled=self._rng.random() < self._ratio)

    def ended(self, request: GatewayRequest, timeline: Timeline) -> None:
        """Make the request's spans, if it is sampled."""
        trace = request.trace
        if trace is None or not trace.is_sampled:
            return
        trace_id = int(trace.trace_id, 16)
        parent = self._context(trace_id, int(trace.parent, 16), is_remote=True) if trace.parent else None
        root = self._context(trace_id, self._new_id(_SPAN_BITS))
        zero = _ns(self._wall_clock() - (self._clock() - timeline.received_at))
        whole = request_span(request, timeline)
        for draft in stage_spans(timeline):
            context = self._context(trace_id, self._new_id(_SPAN_BITS))
            self._spans.on_end(self._span(draft, context, root, zero, SpanKind.INTERNAL))
        self._spans.on_end(self._span(whole, root, parent, zero, SpanKind.SERVER))

    def close(self) -> None:
        """Send what waits; may take seconds."""
        self._spans.shutdown()

    def _new_id(self, bits: int) -> int:
        return self._rng.getrandbits(bits) or 1

    def _context(self, trace_id: int, span_id: int, *, is_remote: bool = False) -> SpanContext:
        return SpanContext(trace_id, span_id, is_remote, TraceFlags(TraceFlags.SAMPLED))

    def _span(
        self, draft: SpanDraft, context: SpanContext, parent: SpanContext | None, zero: int, kind: SpanKind
    ) -> ReadableSpan:
        return ReadableSpan(
            draft.name,
            context,
            parent,
            self._resource,
            draft.attributes,
            [Event(each.name, each.attributes, zero + _ns(each.at_s)) for each in draft.events],
            kind=kind,
            status=Status(StatusCode.ERROR, draft.error) if draft.error else Status(StatusCode.UNSET),
            start_time=zero + _ns(draft.begin_s),
            end_time=zero + _ns(draft.end_s),
            instrumentation_scope=self._scope,
        )


def otlp_tracing(
    endpoint: str,
    *,
    version: str,
    ratio: float,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    rng: random.Random,
) -> Tracing:
    """Towards a collector.  endpoint: URL of its OTLP listener for HTTP, without `/v1/traces`."""
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_TIMEOUT_S)
    resource = Resource.create({"service.version": version})  # with what OTEL_RESOURCE_ATTRIBUTES says
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "headrace-gateway"}))
    return Tracing(BatchSpanProcessor(exporter), resource, ratio=ratio, clock=clock, wall_clock=wall_clock, rng=rng)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
