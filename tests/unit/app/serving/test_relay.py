import asyncio
import gc
import time
import weakref

import msgspec
import numpy as np
import pytest
from structlog.testing import capture_logs

from app.metrics import Metrics
from app.openai.request_headers import HeaderOptions
from app.serving.binding import Dispatcher
from app.serving.prefill_queue import NotQueued, Prefilled
from app.serving.relay import Relay
from app.serving.request import GatewayRequest
from app.serving.retries import ExchangeLimits
from planes.streams.client import WorkerLost
from planes.wire.errors import TOLD_BY_WORKERS, Rejected
from planes.wire.frames import (
    DecodeLeg,
    Done,
    Failed,
    FailureKind,
    FinishReason,
    Format,
    LocalLeg,
    PrefillLeg,
    Sampling,
    StreamId,
    StructuredOutput,
    Ticket,
    Usage,
    unpack_tokens,
)
from planes.wire.messages import HandoverMode, RequestId, Role, WorkerId
from router.errors import NoWorker
from router.request import Failure, HandoverPreference, Outcome, RoutableRequest
from router.router import Refusal
from tests.fakes import FakeResponse, FakeRouter, FakeWorkers, registration, route

PROMPT = np.arange(1, 21, dtype=np.uint32)  # not a multiple of the block size
TICKET = Ticket(WorkerId("p0"), HandoverMode.PULL, 20, 30.0, b"params")
USAGE = Usage(20, 3, 16, queue_s=0.1, prefill_s=0.2)


def done(payload=b"", tokens=(), ticket=None, usage=USAGE):
    return Done(StreamId(1), FinishReason.STOP, usage, payload, list(tokens), ticket)


class Scene:
    """A relay among fakes, and the job under way."""

    def __init__(
        self,
        mode=HandoverMode.PULL,
        max_attempts=3,
        replacement_s=60.0,
        prefills=None,
        keepalive_s=0.0,
        clock=time.monotonic,
    ):
        self.router = FakeRouter()
        self.workers = FakeWorkers(
            registration("p0", Role.PREFILL, mode=mode),
            registration("p1", Role.PREFILL, mode=mode),
            registration("d0", Role.DECODE, mode=mode),
            registration("d1", Role.DECODE, mode=mode),
        )
        self.dispatcher = Dispatcher(self.router, clock=clock)
        self.clock, self.metrics = clock, Metrics()
        self.relay = Relay(
            self.dispatcher,
            self.workers,
            self.metrics,
            clock=clock,
            limits=ExchangeLimits(max_attempts, replacement_s),
            prefills=prefills,
            keepalive_s=keepalive_s,
        )
        self.prefills = prefills
        self.response = FakeResponse()
        self.task = None

    def request(self, *, is_streaming=True, timeout_s=100.0, prompt=PROMPT, options=None, **sampling):
        now = self.clock()
        return GatewayRequest(
            request=RequestId("r"),
            model="sim",
            prompt=prompt,
            blocks=np.empty(0, np.uint64),
            block_size=16,
            sampling=Sampling(**{"max_tokens": 10, "temperature": 0.0, **sampling}),
            format=Format("chat", "id", "sim", 0, is_streaming=is_streaming),
            arrived_at=now,
            deadline=now + timeout_s,
            options=options or HeaderOptions(),
        )

    async def start(self, *routes, **job):
        self.router.answers = [route("r", decode, prefill) for prefill, decode in routes]
        self.task = asyncio.create_task(self.relay.run(self.request(**job), self.response))
        await settle()

    def leg(self, worker, number=-1):
        connection = self.workers.connections[worker]
        return connection.started[number], connection.sinks[number]

    async def finished(self):
        await asyncio.wait_for(self.task, 60)
        assert self.router.bound == set()
        assert self.response.is_ended
        return self.response


async def settle():
    for _ in range(12):
        await asyncio.sleep(0)


@pytest.fixture
async def scene():
    scene = Scene()
    yield scene
    scene.dispatcher.stop()


def metric(scene, line):
    return [found for found in scene.metrics.exposition().decode().splitlines() if found.startswith(line)]


async def test_a_local_leg_is_relayed_verbatim_and_released_with_what_it_measured(scene):
    await scene.start((None, "d0"))
    request, sink = scene.leg("d0")
    assert request.leg == LocalLeg()
    assert unpack_tokens(request.prompt) == PROMPT.tolist()
    sink.on_delta(b"one", [7])
    await settle()
    assert scene.response.is_begun
    assert scene.router.prefills == ["r"]
    sink.on_delta(b"", [8])
    sink.on_done(done(b"three", [9]))
    response = await scene.finished()
    assert response.payloads == [b"one", b"three"]
    assert float(response.headers.pop("x-headrace-overhead-ms")) >= 0
    assert response.headers == {
        "x-request-id": "r",
        "x-headrace-prefill": "d0",
        "x-headrace-decode": "d0",
        "x-headrace-policy": "fake",
    }
    ((_, observed),) = scene.router.released
    assert observed.outcome is Outcome.FINISHED
    assert observed.completion_tokens == 3
    assert (observed.prefill_s, observed.cached_tokens, observed.handover_s) == (0.2, 16, None)
    assert observed.ttft_s is not None
    assert metric(scene, "headrace_requests_total") == ['headrace_requests_total{code="ok",model="sim"} 1.0']


async def test_an_open_stream_s_objects_have_no_dictionaries_and_share_who_is_left_out(scene):
    scene.router.answers = [route("r", "d0", None), route("s", "d0", None)]
    first, second = (scene.relay.begin(scene.request(), scene.response, list) for _ in range(2))
    for kept in (first, first.exchange, first.exchange._retries):
        assert not hasattr(kept, "__dict__")
    assert first.exchange._retries.excluded is second.exchange._retries.excluded
    first.close()
    second.close()


async def test_a_request_that_has_ended_is_freed_at_once(scene):
    gc.disable()
    try:
        scene.router.answers = [route("r", "d0", None)]
        ended = []
        serving = weakref.ref(scene.relay.begin(scene.request(), scene.response, lambda: ended.append("ended")))
        await settle()
        assert ended == []
        sink = scene.leg("d0")[1]
        sink.on_delta(b"one", [7])
        sink.on_done(done(b"two", [8]))
        assert ended == ["ended"], "in the turn in which its last token came"
        assert scene.response.payloads == [b"one", b"two"]
        del sink
        scene.workers.connections["d0"].sinks.clear()
        await settle()
        assert serving() is None
    finally:
        gc.enable()


async def test_without_a_task_the_end_is_told_once_however_it_comes(scene):
    scene.router.answers = [route("r", "d0", None)]
    ended = []
    serving = scene.relay.begin(scene.request(), scene.response, lambda: ended.append("ended"))
    await settle()
    scene.leg("d0")[1].on_delta(b"one", [7])
    scene.response.is_gone = True
    serving.leave()
    serving.leave()
    scene.leg("d0")[1].on_done(done(b"late", [8]))
    assert ended == ["ended"]
    assert scene.router.bound == set()
    assert metric(scene, "headrace_requests_total") == ['headrace_requests_total{code="cancelled",model="sim"} 1.0']


async def test_an_answer_in_one_piece_is_the_body_of_the_done(scene):
    await scene.start((None, "d0"), is_streaming=False)
    _, sink = scene.leg("d0")
    sink.on_delta(b"", [7])
    sink.on_done(done(b'{"whole":1}', [8]))
    response = await scene.finished()
    assert (response.status, response.body, response.payloads) == (200, b'{"whole":1}', [])
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-headrace-decode"] == "d0"


async def test_pull_streams_the_first_token_before_the_handover(scene):
    await scene.start(("p0", "d0"))
    request, sink = scene.leg("p0")
    assert request.leg == PrefillLeg(HandoverMode.PULL, emit_first=True)
    assert request.sampling.max_tokens == 10
    sink.on_done(done(b"first", [7], TICKET))
    await settle()
    assert scene.response.is_begun
    assert scene.response.payloads == [b"first"]
    assert scene.router.prefills == ["r"]
    request, sink = scene.leg("d0")
    assert request.leg == DecodeLeg(ticket=TICKET)
    assert unpack_tokens(request.resume) == [7]
    sink.on_done(done(b"rest", [8, 9], usage=Usage(20, 3, 16, handover_s=0.5, handover_bytes=1000)))
    response = await scene.finished()
    assert response.payloads == [b"first", b"rest"]
    assert (response.headers["x-headrace-prefill"], response.headers["x-headrace-decode"]) == ("p0", "d0")
    ((_, observed),) = scene.router.released
    assert (observed.prefill_s, observed.handover_s, observed.handover_bytes) == (0.2, 0.5, 1000)
    assert observed.completion_tokens == 3
    assert metric(scene, "headrace_handover_bytes_total") == ['headrace_handover_bytes_total{model="sim"} 1000.0']


async def test_an_answer_in_one_piece_gets_its_first_token_from_the_decode_worker(scene):
    await scene.start(("p0", "d0"), is_streaming=False)
    request, sink = scene.leg("p0")
    assert request.leg == PrefillLeg(HandoverMode.PULL)
    sink.on_done(done(ticket=TICKET))
    await settle()
    request, sink = scene.leg("d0")
    assert request.resume == b""
    assert not scene.response.is_begun
    sink.on_done(done(b"all", [7]))
    await scene.finished()


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "seed": 1},
        {"min_p": 0.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"min_tokens": 2},
        {"bad_words": [[1, 2]]},
        {"structured": StructuredOutput(json_schema="{}")},
        {"prompt": PROMPT[:16]},
    ],
)
async def test_a_streamed_answer_s_first_token_is_asked_of_the_prefill_worker(scene, sampling):
    await scene.start(("p0", "d0"), **sampling)
    request, sink = scene.leg("p0")
    assert request.leg.emit_first
    sink.on_done(done(b"x", [7]))
    await scene.finished()


@pytest.mark.parametrize("code", sorted(TOLD_BY_WORKERS))
async def test_what_only_an_engine_finds_wrong_is_the_client_s_fault_and_no_other_is_asked(scene, code):
    await scene.start(("p0", "d0"), structured=StructuredOutput(regex="("))
    _, sink = scene.leg("p0")
    sink.on_failed(Failed(1, FailureKind.INVALID, code, "the regex has no end", "response_format"))
    response = await scene.finished()
    assert response.status == 400
    assert b"the regex has no end" in response.body
    assert b"response_format" in response.body
    ((_, observed),) = scene.router.released
    assert observed.failure.code == code


@pytest.mark.parametrize("seed", [None, 5])
async def test_a_first_token_that_ends_the_request_needs_no_decode_worker(scene, seed):
    await scene.start(("p0", "d0"), seed=seed, temperature=1.0)
    _, sink = scene.leg("p0")
    sink.on_done(done(b"all of it", [7]))
    response = await scene.finished()
    assert response.payloads == [b"all of it"]
    assert scene.workers.connections["d0"].started == []
    ((_, observed),) = scene.router.released
    assert observed.completion_tokens == 1


async def test_push_starts_both_legs_at_once_under_one_name():
    scene = Scene(HandoverMode.PUSH)
    await scene.start(("p0", "d0"))
    (prefill, giver), (decode, taker) = scene.leg("p0"), scene.leg("d0")
    assert prefill.leg == PrefillLeg(HandoverMode.PUSH)
    assert decode.leg == DecodeLeg(source=scene.workers.registration("p0").handover)
    assert prefill.request == decode.request
    giver.on_done(done(ticket=TICKET))
    await settle()
    assert scene.router.prefills == ["r"]
    taker.on_delta(b"one", [7])
    taker.on_done(done(b"two", [8]))
    assert (await scene.finished()).payloads == [b"one", b"two"]


async def test_a_push_whose_giver_is_lost_is_routed_again_and_the_taker_stopped():
    scene = Scene(HandoverMode.PUSH)
    await scene.start(("p0", "d0"), (None, "d0"))
    _, giver = scene.leg("p0")
    giver.on_lost(WorkerLost(WorkerId("p0"), "killed"))
    await settle()
    assert scene.workers.connections["d0"].cancelled == [1]
    assert scene.router.submitted[-1].excluded == {"p0"}
    request, sink = scene.leg("d0")
    assert request.leg == LocalLeg()
    assert request.request == "r.2"
    sink.on_done(done(b"x", [7]))
    response = await scene.finished()
    assert response.headers["x-headrace-fallback"] == "worker_lost"
    assert metric(scene, "headrace_fallbacks_total") == ['headrace_fallbacks_total{code="worker_lost"} 1.0']


@pytest.mark.parametrize("failure", ["lost", "rejected", "interrupted", "unreachable"])
async def test_a_prefill_that_fails_is_tried_elsewhere(scene, failure):
    scene.workers.connections["p0"].refuses = failure == "unreachable"
    await scene.start(("p0", "d0"), ("p1", "d0"))
    if failure == "lost":
        scene.leg("p0")[1].on_lost(WorkerLost(WorkerId("p0"), "killed"))
    elif failure != "unreachable":
        scene.leg("p0")[1].on_failed(Failed(StreamId(1), FailureKind(failure), "worker_busy", "busy"))
    await settle()
    assert scene.router.submitted[-1].excluded == {"p0"}
    assert not scene.router.submitted[-1].is_local_only
    scene.leg("p1")[1].on_done(done(b"x", [7]))
    response = await scene.finished()
    assert response.headers["x-headrace-prefill"] == "p1"
    assert "x-headrace-fallback" not in response.headers
    assert [observed.outcome for _, observed in scene.router.released] == [Outcome.INTERRUPTED, Outcome.FINISHED]


async def test_a_handover_that_fails_puts_both_workers_under_suspicion(scene):
    await scene.start(("p0", "d0"), (None, "d1"))
    scene.leg("p0")[1].on_done(done(b"first", [7], TICKET))
    await settle()
    scene.leg("d0")[1].on_failed(Failed(StreamId(1), FailureKind.INTERRUPTED, "engine_error", "no KV cache"))
    await settle()
    assert scene.router.submitted[-1].excluded == {"p0", "d0"}
    assert scene.workers.connections["p0"].released == ["r"]
    request, sink = scene.leg("d1")
    assert (request.leg, unpack_tokens(request.resume)) == (LocalLeg(), [7])
    sink.on_done(done(b"rest", [8]))
    assert (await scene.finished()).payloads == [b"first", b"rest"]


async def test_an_expired_ticket_is_not_used(scene):
    await scene.start(("p0", "d0"), ("p1", "d0"), seed=1, temperature=1.0)
    scene.leg("p0")[1].on_done(done(ticket=msgspec.structs.replace(TICKET, lease_s=0.0)))
    await settle()
    assert scene.workers.connections["d0"].started == []
    scene.leg("p1")[1].on_done(done(b"x", [7]))
    await scene.finished()
    assert metric(scene, "headrace_retries_total") == ['headrace_retries_total{code="ticket_expired"} 1.0']


async def test_a_stream_that_is_lost_goes_on_elsewhere_from_the_client_s_tokens(scene):
    await scene.start(("p0", "d0"), (None, "d1"))
    scene.leg("p0")[1].on_done(done(b"a", [1], TICKET))
    await settle()
    sink = scene.leg("d0")[1]
    sink.on_delta(b"b", [2])
    sink.on_delta(b"", [3])
    sink.on_lost(WorkerLost(WorkerId("d0"), "killed"))
    await settle()
    again = scene.router.submitted[-1]
    assert (again.excluded, again.is_local_only, again.expected_tokens) == ({"d0"}, True, 7)
    request, sink = scene.leg("d1")
    assert unpack_tokens(request.resume) == [1, 2, 3]
    assert unpack_tokens(request.prompt) == PROMPT.tolist()
    sink.on_delta(b"d", [4])
    sink.on_done(done(b"e", [5]))
    assert (await scene.finished()).payloads == [b"a", b"b", b"d", b"e"]
    assert metric(scene, "headrace_migrations_total") == ['headrace_migrations_total{code="worker_lost"} 1.0']
    before, last = (observed for _, observed in scene.router.released)
    assert before.failure == Failure("worker_lost", WorkerId("d0"), "worker d0 was lost: killed")
    assert (before.completion_tokens, last.completion_tokens, last.failure) == (3, 2, None)


@pytest.mark.parametrize("code", sorted(TOLD_BY_WORKERS))
async def test_what_an_engine_refuses_that_another_has_begun_goes_on_elsewhere(scene, code):
    await scene.start((None, "d0"), (None, "d1"), (None, "p0"))
    scene.leg("d0")[1].on_delta(b"a", [1])
    scene.leg("d0")[1].on_lost(WorkerLost(WorkerId("d0"), "killed"))
    await settle()
    scene.leg("d1")[1].on_failed(Failed(1, FailureKind.INVALID, code, "not here", "response_format"))
    await settle()
    assert scene.router.submitted[-1].excluded == {"d0", "d1"}
    scene.leg("p0")[1].on_done(done(b"b", [2]))
    assert (await scene.finished()).payloads == [b"a", b"b"]


async def test_attempts_in_a_row_without_a_token_are_bounded():
    scene = Scene(max_attempts=2)
    await scene.start((None, "d0"), (None, "d1"))
    scene.leg("d0")[1].on_lost(WorkerLost(WorkerId("d0"), "killed"))
    await settle()
    scene.leg("d1")[1].on_lost(WorkerLost(WorkerId("d1"), "killed"))
    response = await scene.finished()
    assert response.status == 502
    assert b"worker d1 was lost: killed" in response.body


async def test_a_begun_answer_waits_for_a_worker_when_none_is_left(scene):
    await scene.start((None, "d0"))
    sink = scene.leg("d0")[1]
    sink.on_delta(b"a", [1])
    scene.router.refuses = NoWorker("sim", num_workers=0)
    sink.on_lost(WorkerLost(WorkerId("d0"), "killed"))
    await settle()
    assert not scene.response.is_ended
    scene.router.refuses = None
    scene.router.answers = [route("r", "d0", None)]  # the same worker, started again
    scene.workers.join("d0")
    await settle()
    assert scene.router.submitted[-1].excluded == frozenset()
    request, sink = scene.leg("d0")
    assert unpack_tokens(request.resume) == [1]
    sink.on_done(done(b"b", [2]))
    assert (await scene.finished()).payloads == [b"a", b"b"]
    assert metric(scene, "headrace_replacement_waits_total") == [
        'headrace_replacement_waits_total{outcome="replaced"} 1.0'
    ]


async def test_a_request_that_kills_whoever_serves_it_is_given_up():
    scene = Scene(max_attempts=2)
    await scene.start((None, "d0"))
    for number in range(3):
        sink = scene.leg("d0")[1]
        sink.on_delta(b"%d" % number, [number])
        scene.router.refuses = NoWorker("sim", num_workers=0)
        sink.on_lost(WorkerLost(WorkerId("d0"), "killed"))
        await settle()
        scene.router.refuses = None
        scene.router.answers = [route("r", "d0", None)]
        scene.workers.join("d0")
        await settle()
    response = await scene.finished()
    assert response.payloads[:-1] == [b"0", b"1", b"2"]
    assert b'"code":"no_worker"' in response.payloads[-1]
    assert metric(scene, "headrace_replacement_waits_total") == [
        'headrace_replacement_waits_total{outcome="replaced"} 2.0',
        'headrace_replacement_waits_total{outcome="gave_up"} 1.0',
    ]


async def test_a_wait_that_the_deadline_ends_was_in_vain(scene):
    await scene.start((None, "d0"), timeout_s=0.1)
    sink = scene.leg("d0")[1]
    sink.on_delta(b"a", [1])
    scene.router.refuses = NoWorker("sim", num_workers=0)
    sink.on_lost(WorkerLost(WorkerId("d0"), "killed"))
    assert b'"code":"deadline"' in (await scene.finished()).payloads[-1]
    assert metric(scene, "headrace_replacement_waits_total") == [
        'headrace_replacement_waits_total{outcome="gave_up"} 1.0'
    ]


async def test_it_waits_no_longer_than_it_may():
    scene = Scene(replacement_s=0.0)
    await scene.start((None, "d0"))
    sink = scene.leg("d0")[1]
    sink.on_delta(b"a", [1])
    scene.router.refuses = NoWorker("sim", num_workers=0)
    sink.on_lost(WorkerLost(WorkerId("d0"), "killed"))
    assert b'"code":"no_worker"' in (await scene.finished()).payloads[-1]
    assert metric(scene, "headrace_replacement_waits_total") == [
        'headrace_replacement_waits_total{outcome="gave_up"} 1.0'
    ]


async def test_a_request_without_a_token_is_refused_when_no_worker_is_left(scene):
    await scene.start((None, "d0"))
    scene.router.refuses = NoWorker("sim", num_workers=0)
    scene.leg("d0")[1].on_lost(WorkerLost(WorkerId("d0"), "killed"))
    assert (await scene.finished()).status == 503
    assert metric(scene, "headrace_replacement_waits_total") == []


async def test_progress_allows_more_attempts():
    scene = Scene(max_attempts=2)
    await scene.start(*[(None, f"d{i % 2}") for i in range(4)])
    for i in range(3):
        sink = scene.leg(f"d{i % 2}")[1]
        sink.on_delta(b"%d" % i, [i])
        sink.on_lost(WorkerLost(WorkerId(f"d{i % 2}"), "killed"))
        await settle()
    scene.leg("d1")[1].on_done(done(b"end", [9]))
    assert (await scene.finished()).payloads == [b"0", b"1", b"2", b"end"]


async def test_a_stream_of_several_choices_that_is_lost_ends_with_an_error_event(scene):
    await scene.start((None, "d0"), n=2, temperature=1.0)
    assert scene.router.submitted[0].is_local_only
    sink = scene.leg("d0")[1]
    sink.on_delta(b"a", [1])
    await settle()
    sink.on_lost(WorkerLost(WorkerId("d0"), "killed"))
    response = await scene.finished()
    assert response.payloads[0] == b"a"
    assert b'"code":"not_resumable"' in response.payloads[1]


@pytest.mark.parametrize("sampling", [{"n": 2, "temperature": 1.0}, {"logprobs": 1}])
async def test_a_whole_answer_that_cannot_be_resumed_starts_over(scene, sampling):
    await scene.start((None, "d0"), (None, "d1"), is_streaming=False, **sampling)
    sink = scene.leg("d0")[1]
    sink.on_delta(b"", [1])
    sink.on_lost(WorkerLost(WorkerId("d0"), "killed"))
    await settle()
    request, sink = scene.leg("d1")
    assert request.resume == b""
    sink.on_done(done(b"{}", [1, 2]))
    assert (await scene.finished()).body == b"{}"


async def test_what_a_worker_finds_invalid_is_the_fleet_s_fault_and_tried_elsewhere(scene):
    await scene.start((None, "d0"), (None, "d1"))
    failed = Failed(StreamId(1), FailureKind.INVALID, "context_length_exceeded", "too long", "messages")
    scene.leg("d0")[1].on_failed(failed)
    await settle()
    assert scene.router.submitted[-1].excluded == {"d0"}
    scene.leg("d1")[1].on_done(done(b"all", [7]))
    assert (await scene.finished()).payloads == [b"all"]
    assert metric(scene, "headrace_retries_total") == ['headrace_retries_total{code="worker_disagrees"} 1.0']


async def test_what_all_workers_find_invalid_is_not_the_client_s_error():
    scene = Scene(max_attempts=2)
    await scene.start((None, "d0"), (None, "d1"))
    failed = Failed(StreamId(1), FailureKind.INVALID, "context_length_exceeded", "too long", "messages")
    for worker in ("d0", "d1"):
        scene.leg(worker)[1].on_failed(failed)
        await settle()
    response = await scene.finished()
    assert response.status == 502
    assert b'"code":"worker_disagrees"' in response.body


async def test_the_router_s_refusal_reaches_the_client(scene):
    scene.router.refuses = Rejected("no room", retry_after_s=2.0)
    await scene.start()
    response = await scene.finished()
    assert (response.status, response.headers["retry-after"], response.headers["x-request-id"]) == (503, "2", "r")


async def test_a_client_that_goes_cancels_its_legs_and_frees_its_reservation():
    scene = Scene(HandoverMode.PUSH)
    await scene.start(("p0", "d0"))
    scene.response.is_gone = True
    scene.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.task
    assert scene.workers.connections["p0"].cancelled == [1]
    assert scene.workers.connections["d0"].cancelled == [1]
    ((_, observed),) = scene.router.released
    assert observed.outcome is Outcome.CANCELLED
    assert scene.response.status is None
    assert 'code="cancelled"' in metric(scene, "headrace_requests_total")[0]


async def test_a_client_that_goes_in_mid_stream_stops_its_worker(scene):
    await scene.start((None, "d0"))
    scene.leg("d0")[1].on_delta(b"a", [1])
    await settle()
    scene.response.is_gone = True
    scene.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.task
    assert scene.workers.connections["d0"].cancelled == [1]


async def test_a_client_that_goes_while_its_request_waits_is_withdrawn(scene):
    await scene.start()
    scene.response.is_gone = True
    scene.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.task
    assert scene.router.withdrawn == ["r"]
    assert scene.router.released == []


@pytest.mark.parametrize("is_begun", [False, True])
async def test_a_stopping_gateway_says_so(scene, is_begun):
    await scene.start((None, "d0"))
    if is_begun:
        scene.leg("d0")[1].on_delta(b"a", [1])
        await settle()
    scene.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.task
    told = scene.response.payloads[-1] if is_begun else scene.response.body
    assert b"gateway_stopping" in told
    assert scene.response.is_ended
    assert scene.router.bound == set()


@pytest.mark.parametrize("ahead_s", [-1e6, 1e6])
async def test_a_deadline_is_an_instant_on_the_gateway_s_clock_and_not_on_the_loop_s(ahead_s):
    scene = Scene(clock=lambda: time.monotonic() + ahead_s)
    await scene.start((None, "d0"), timeout_s=100.0)
    assert not scene.response.is_ended
    scene.task.cancel()
    await asyncio.wait([scene.task])
    scene = Scene(clock=lambda: time.monotonic() + ahead_s)
    await scene.start((None, "d0"), timeout_s=0.0)
    assert b'"code":"deadline"' in (await scene.finished()).body


@pytest.mark.parametrize("is_begun", [False, True])
async def test_a_deadline_ends_the_request_in_the_shape_that_is_left(scene, is_begun):
    await scene.start((None, "d0"), timeout_s=0.2)
    if is_begun:
        scene.leg("d0")[1].on_delta(b"a", [1])
    response = await scene.finished()
    told = response.payloads[-1] if is_begun else response.body
    assert b'"code":"deadline"' in told
    assert response.status == (200 if is_begun else 504)
    assert scene.workers.connections["d0"].cancelled == [1]


async def test_a_bug_of_ours_is_answered_and_counted(scene):
    def broken(worker):
        raise ZeroDivisionError("secret prompt")

    scene.workers.connection = broken
    await scene.start((None, "d0"))
    response = await scene.finished()
    assert response.status == 500
    assert b"secret" not in response.body
    assert 'code="internal_error"' in metric(scene, "headrace_requests_total")[0]


class BrokenTracer:
    def ended(self, *_):
        raise ZeroDivisionError


async def test_a_bug_in_the_books_costs_nobody_else_an_answer(scene):
    scene.relay.tracer = BrokenTracer()
    answers = []
    scene.router.answers = [Refusal(RequestId("r"), Rejected("too late")), route("other", "d1")]
    scene.dispatcher.submit(RoutableRequest(RequestId("other"), "m", np.empty(0, np.uint64), 1, 1, 1e9), answers.append)
    with capture_logs() as logs:
        await scene.relay.run(scene.request(), scene.response)
    assert scene.response.status == 503
    assert [found.decode for found in answers] == ["d1"]
    assert [(line["event"], line["request_id"]) for line in logs] == [("request.bug", "r")]


async def test_a_prefill_worker_without_an_endpoint_is_not_used(scene):
    scene.workers.registrations[WorkerId("p0")] = registration("p0", Role.PREFILL, mode=None)
    await scene.start(("p0", "d0"), (None, "d0"))
    scene.leg("d0")[1].on_done(done(b"x", [1]))
    response = await scene.finished()
    assert response.headers["x-headrace-fallback"] == "worker_unreachable"


async def test_a_failed_handover_is_not_insisted_on(scene):
    options = HeaderOptions(HandoverPreference.ALWAYS, is_explained=True)
    await scene.start(("p0", "d0"), (None, "d1"), options=options)
    assert scene.router.submitted[0].handover is HandoverPreference.ALWAYS
    _, sink = scene.leg("p0")
    sink.on_failed(Failed(StreamId(1), FailureKind.INTERRUPTED, "engine_error", "out of luck"))
    await settle()
    assert scene.router.submitted[1].handover is HandoverPreference.AUTO
    _, sink = scene.leg("d1")
    sink.on_done(done(b"all", [7]))
    response = await scene.finished()
    assert response.headers["x-headrace-fallback"] == "engine_error"
    assert '"prefill":null,"decode":"d1"' in response.headers["x-headrace-route"]


async def test_a_request_that_wants_no_handover_never_gets_one(scene):
    await scene.start((None, "d0"), (None, "d1"), options=HeaderOptions(HandoverPreference.NEVER))
    scene.leg("d0")[1].on_lost(WorkerLost(WorkerId("d0"), "gone"))
    await settle()
    assert [each.handover for each in scene.router.submitted] == [HandoverPreference.NEVER] * 2
    scene.leg("d1")[1].on_done(done(b"all", [7]))
    assert "x-headrace-route" not in (await scene.finished()).headers


class FakePrefills:
    def __init__(self):
        self.asked, self.released = [], []
        self.outcome = asyncio.get_running_loop().create_future()

    async def prefill(self, model, request):
        self.asked.append((model, request))
        return await self.outcome

    def release(self, model, job, worker):
        self.released.append((model, job, worker))


@pytest.fixture
async def queueing():
    scene = Scene(prefills=FakePrefills())
    yield scene
    scene.dispatcher.stop()


async def test_a_prompt_from_the_queue_is_decoded_with_the_ticket_of_whoever_took_it(queueing):
    scene = queueing
    await scene.start(("p0", "d0"))
    ((model, request),) = scene.prefills.asked
    assert (model, request.request, request.leg) == ("sim", "r", PrefillLeg(HandoverMode.PULL, emit_first=True))
    assert scene.workers.connections["p0"].started == []
    ticket = msgspec.structs.replace(TICKET, worker=WorkerId("p1"))
    scene.prefills.outcome.set_result(Prefilled(WorkerId("p1"), done(b"first", [7], ticket)))
    await settle()
    assert (scene.response.headers["x-headrace-prefill"], scene.response.payloads) == ("p1", [b"first"])
    request, sink = scene.leg("d0")
    assert request.leg == DecodeLeg(ticket=ticket)
    assert unpack_tokens(request.resume) == [7]
    sink.on_done(done(b"rest", [8]))
    response = await scene.finished()
    assert response.payloads == [b"first", b"rest"]
    assert "x-headrace-fallback" not in response.headers
    ((_, observed),) = scene.router.released
    assert (observed.prefill, observed.completion_tokens) == ("p1", 2)
    assert scene.router.prefills == ["r"]


async def test_who_took_its_own_prompt_goes_on_without_fetching(queueing):
    scene = queueing
    await scene.start(("p0", "d0"))
    given = Prefilled(WorkerId("d0"), done(b"first", [7], TICKET), RequestId("r.q"))
    scene.prefills.outcome.set_result(given)
    await settle()
    request, sink = scene.leg("d0")
    assert (request.leg, unpack_tokens(request.resume)) == (LocalLeg(), [7])
    assert scene.prefills.released == [("sim", "r.q", "d0")]
    sink.on_done(done(b"rest", [8]))
    assert (await scene.finished()).payloads == [b"first", b"rest"]


async def test_what_the_queue_cannot_take_is_sent_directly_and_it_is_said(queueing):
    scene = queueing
    await scene.start(("p0", "d0"))
    scene.prefills.outcome.set_exception(NotQueued("prefill_queue_full", "full"))
    await settle()
    scene.leg("p0")[1].on_done(done(b"first", [7], TICKET))
    await settle()
    scene.leg("d0")[1].on_done(done(b"rest", [8]))
    response = await scene.finished()
    assert response.headers["x-headrace-prefill"] == "p0"
    assert response.headers["x-headrace-fallback"] == "prefill_queue_full"
    assert metric(scene, "headrace_prefill_queue_bypasses_total") == [
        'headrace_prefill_queue_bypasses_total{code="prefill_queue_full"} 1.0'
    ]


async def test_a_prompt_that_failed_from_the_queue_goes_directly_to_another_worker(queueing):
    scene = queueing
    await scene.start(("p0", "d0"), ("p0", "d0"))
    scene.prefills.outcome.set_exception(WorkerLost(WorkerId("p1"), "gone"))
    await settle()
    assert scene.router.submitted[1].excluded == {"p1"}
    scene.leg("p0")[1].on_done(done(b"first", [7], TICKET))
    await settle()
    scene.leg("d0")[1].on_done(done(b"rest", [8]))
    response = await scene.finished()
    assert response.headers["x-headrace-fallback"] == "retried"
    assert len(scene.prefills.asked) == 1


async def test_a_client_that_goes_while_its_prompt_is_queued_is_not_waited_for(queueing):
    scene = queueing
    await scene.start(("p0", "d0"))
    scene.response.is_gone = True
    scene.task.cancel()
    await asyncio.gather(scene.task, return_exceptions=True)
    assert scene.prefills.outcome.cancelled()
    assert scene.router.bound == set()


async def test_a_handed_over_request_asks_the_router_three_times_at_most(scene):
    await scene.start(("p0", "d0"))
    _, prefill = scene.leg("p0")
    prefill.on_done(done(b"a", [1], TICKET))
    await settle()
    _, decode = scene.leg("d0")
    for _ in range(5):
        decode.on_delta(b"b", [2])
    decode.on_done(done())
    await scene.finished()
    await settle()
    assert scene.router.log.count("dispatch") <= 3  # bound, prefilled, released


@pytest.fixture
async def impatient():
    scene = Scene(keepalive_s=1e-4)
    yield scene
    scene.dispatcher.stop()


async def heard(scene, times=1):
    """Wait until the client has heard so many comments."""
    for _ in range(100_000):
        if scene.response.payloads.count(COMMENT) >= times:
            return
        await asyncio.sleep(0)
    raise AssertionError(scene.response.payloads)


COMMENT = b": keep-alive\n\n"


async def test_a_stream_whose_prompt_is_still_computed_is_kept_alive(impatient):
    await impatient.start((None, "d0"))
    await heard(impatient, 3)
    assert impatient.response.headers["x-headrace-decode"] == "d0"
    _, sink = impatient.leg("d0")
    sink.on_delta(b"one", [1])
    sink.on_done(done(b"end", [2]))
    response = await impatient.finished()
    assert [payload for payload in response.payloads if payload != COMMENT] == [b"one", b"end"]


async def test_an_answer_in_one_piece_is_not_kept_alive(impatient):
    await impatient.start((None, "d0"), is_streaming=False)
    for _ in range(50):
        await asyncio.sleep(0.0002)
    assert not impatient.response.is_begun
    impatient.leg("d0")[1].on_done(done(b"{}", [1]))
    await impatient.finished()


async def test_after_a_comment_an_error_is_an_event(impatient):
    await impatient.start()
    await heard(impatient)
    impatient.task.cancel()
    await asyncio.gather(impatient.task, return_exceptions=True)
    response = impatient.response
    assert (response.status, response.is_ended) == (200, True)
    assert b'"code":"gateway_stopping"' in response.payloads[-1]


async def test_several_choices_that_were_only_kept_alive_start_over(impatient):
    await impatient.start((None, "d0"), n=2)
    await heard(impatient)
    impatient.router.answers = [route("r", "d1")]
    impatient.leg("d0")[1].on_lost(WorkerLost(WorkerId("d0"), "gone"))
    await settle()
    _, sink = impatient.leg("d1")
    sink.on_done(done(b"all", [1, 2]))
    assert (await impatient.finished()).payloads[-1] == b"all"


class Recording:
    def __init__(self):
        self.lines = []

    def ended(self, prompt, root, *, completion_tokens, ago_s):
        assert ago_s >= 0
        self.lines.append((prompt.tolist(), root, completion_tokens))


async def test_a_served_request_is_recorded_with_its_prompt_and_the_length_of_its_answer(scene):
    scene.relay.recorder = Recording()
    await scene.start((None, "d0"))
    _, sink = scene.leg("d0")
    sink.on_delta(b"one", [7])
    sink.on_done(done(b"two", [8, 9]))
    await scene.finished()
    assert scene.relay.recorder.lines == [(PROMPT.tolist(), "sim\0", 3)]


async def test_choices_are_recorded_as_one_answer_of_their_mean_length(scene):
    scene.relay.recorder = Recording()
    await scene.start((None, "d0"), n=2)
    _, sink = scene.leg("d0")
    sink.on_done(done(b"all", [7, 8, 9, 10]))
    await scene.finished()
    assert scene.relay.recorder.lines == [(PROMPT.tolist(), "sim\0", 2)]


async def test_a_request_that_no_worker_began_is_not_recorded(scene):
    scene.relay.recorder = Recording()
    scene.router.refuses = NoWorker("sim", num_workers=0)
    scene.task = asyncio.create_task(scene.relay.run(scene.request(), scene.response))
    await scene.finished()
    assert scene.relay.recorder.lines == []


# --- what is counted --------------------------------------------------------------------------------------------------


class FakeMeter:
    def __init__(self):
        self.told = []

    def spent(self, *, prompt_tokens, completion_tokens):
        self.told.append((prompt_tokens, completion_tokens))

    def headers(self):
        return [("x-ratelimit-remaining-tokens", "7")]


async def metered(scene, *routes, **job):
    """Start a request that is counted."""
    meter = FakeMeter()
    plain = scene.request
    scene.request = lambda **fields: msgspec.structs.replace(plain(**fields), meter=meter)
    await scene.start(*routes, **job)
    return meter


async def cancelled(scene):
    scene.response.is_gone = True
    scene.task.cancel()
    await asyncio.gather(scene.task, return_exceptions=True)


async def test_a_request_counts_as_its_prompt_and_what_it_was_answered(scene):
    meter = await metered(scene, (None, "d0"))
    _, sink = scene.leg("d0")
    sink.on_delta(b"a", [1])
    assert meter.told == []
    sink.on_done(done(b"b", [2, 3]))
    await scene.finished()
    assert meter.told == [(20, 3)]
    assert scene.response.headers["x-ratelimit-remaining-tokens"] == "7"


async def test_a_cancelled_stream_counts_what_its_worker_had_computed(scene):
    meter = await metered(scene, (None, "d0"))
    _, sink = scene.leg("d0")
    sink.on_delta(b"a", [1])
    sink.on_delta(b"b", [2])
    await cancelled(scene)
    assert meter.told == [(20, 2)]
    scene.workers.connections["d0"].on_rest(done(usage=Usage(20, 5, 0)))
    assert meter.told == [(20, 2), (0, 3)]


async def test_a_prompt_counts_when_it_has_been_computed(scene):
    meter = await metered(scene, (None, "d0"))
    await cancelled(scene)
    assert meter.told == []
    scene.workers.connections["d0"].on_rest(done(usage=Usage(20, 0, 0)))
    assert meter.told == []
    scene.workers.connections["d0"].on_rest(done(usage=Usage(20, 1, 0)))
    assert meter.told == [(20, 1)], "its first token was under way"


async def test_a_prompt_that_was_handed_over_counts_though_nothing_was_decoded(scene):
    meter = await metered(scene, ("p0", "d0"), is_streaming=False)
    _, sink = scene.leg("p0")
    sink.on_done(done(ticket=TICKET))
    await settle()
    await cancelled(scene)
    assert meter.told == [(20, 0)]


async def test_a_prompt_whose_ticket_crosses_the_cancellation_counts(scene):
    meter = await metered(scene, ("p0", "d0"))
    await cancelled(scene)
    scene.workers.connections["p0"].on_rest(done(ticket=TICKET, tokens=[1]))
    assert meter.told == [(20, 0)]


async def test_what_is_tried_again_counts_once(scene):
    meter = await metered(scene, (None, "d0"), (None, "d1"))
    _, sink = scene.leg("d0")
    sink.on_delta(b"a", [1])
    sink.on_lost(WorkerLost(WorkerId("d0"), "gone"))
    await settle()
    _, sink = scene.leg("d1")
    sink.on_done(done(b"b", [2]))
    await scene.finished()
    assert meter.told == [(20, 2)]
