"""Spans, as OpenTelemetry's SDK would export them."""

import random
import subprocess
import sys

import pytest
from msgspec.structs import replace
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind, StatusCode

from app.serving import events as on
from app.telemetry.trace_context import TraceContext
from app.telemetry.tracing import Tracing
from planes.streams.client import WorkerLost
from tests.unit.app.serving.test_exchange import request
from tests.unit.app.serving.test_timeline import D0, DECODE_USAGE, Told, done, handed_over

TRACE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
WALL = 1_700_000_000


class Collected:
    def __init__(self):
        self.spans = []

    def on_end(self, span):
        self.spans.append(span)


def tracing(ratio=1.0, now=100.0):
    collected = Collected()
    made = Tracing(
        collected,
        Resource({}),
        ratio=ratio,
        clock=lambda: now,
        wall_clock=lambda: WALL + now,
        rng=random.Random(1),
    )
    return made, collected


def finished():
    scene, leg = handed_over()
    return scene.at(2.5, on.LegOutput(leg, b"x", [2])).at(4.0, on.LegDone(leg, done(DECODE_USAGE, [3]))).timeline()


def test_a_request_is_one_tree_with_the_spans_of_both_workers():
    made, collected = tracing()
    made.ended(replace(request(), trace=TRACE), finished())
    *children, root = collected.spans
    assert [span.name for span in children] == [
        "prepare",
        "queue",
        "wait p0",
        "prefill p0",
        "handover p0 → d0",
        "decode d0",
    ]
    assert {format(span.context.trace_id, "032x") for span in collected.spans} == {TRACE.trace_id}
    assert {span.parent.span_id for span in children} == {root.context.span_id}
    assert len({span.context.span_id for span in collected.spans}) == 7
    assert (format(root.parent.span_id, "016x"), root.parent.is_remote) == (TRACE.parent, True)
    assert (root.kind, root.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
    handover = children[4]
    assert (handover.start_time, handover.end_time) == (WALL * 10**9 + 2 * 10**9, WALL * 10**9 + 2125 * 10**6)
    assert handover.attributes["headrace.bytes"] == 4096
    assert (root.start_time, root.end_time) == (WALL * 10**9, (WALL + 4) * 10**9)


def test_the_root_speaks_the_words_of_the_genai_conventions():
    made, collected = tracing()
    made.ended(replace(request(temperature=0.5), trace=TRACE), finished())
    root = collected.spans[-1]
    assert root.name == "chat sim"
    told = dict(root.attributes)
    assert {name: told[name] for name in told if name.startswith("gen_ai.usage")} == {
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 5,
    }
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.response.time_to_first_chunk"] == 2.0
    assert "gen_ai.request.seed" not in told, "what was not asked for is not told"
    assert not any("prompt" in name or "message" in name for name in told), "no text"


def test_a_migration_is_an_event_and_an_error_a_status():
    scene = Told().bound(1.0, "d0")
    leg = scene.new_leg()
    scene.at(2.0, on.LegOutput(leg, b"x", [1])).at(3.0, on.LegFailed(leg, WorkerLost(D0, "killed")))
    scene.at(4.0, on.Deadline())
    made, collected = tracing()
    made.ended(replace(request(), trace=TRACE), scene.timeline())
    root = collected.spans[-1]
    assert [event.name for event in root.events] == ["first_token", "migration"]
    assert dict(root.events[1].attributes) == {
        "headrace.attempt": 1,
        "error.type": "worker_lost",
        "headrace.worker": "d0",
    }
    assert (root.status.status_code, root.attributes["error.type"]) == (StatusCode.ERROR, "deadline")


def test_a_trace_of_ours_has_no_parent():
    made, collected = tracing()
    made.ended(replace(request(), trace=made.started()), finished())
    assert collected.spans[-1].parent is None


@pytest.mark.parametrize("trace", [None, replace(TRACE, is_sampled=False)])
def test_what_is_not_sampled_has_no_spans(trace):
    made, collected = tracing()
    made.ended(replace(request(), trace=trace), finished())
    assert collected.spans == []


def test_about_the_share_that_is_asked_for_is_sampled():
    made, _ = tracing(ratio=0.25)
    started = [made.started() for _ in range(2000)]
    assert 400 < sum(trace.is_sampled for trace in started) < 600
    assert len({trace.trace_id for trace in started}) == 2000


def test_a_gateway_that_traces_nothing_does_not_import_the_sdk():
    code = "import sys, app.main; print(sorted(name for name in sys.modules if name.startswith('opentelemetry')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
