import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from planes.wire.errors import UNUSABLE_GRAMMAR, InvalidRequest
from planes.wire.frames import (
    DecodeLeg,
    Delta,
    Done,
    Failed,
    FailureKind,
    FinishReason,
    Format,
    Generate,
    LocalLeg,
    Parsing,
    PrefillLeg,
    Sampling,
    Ticket,
    pack_tokens,
)
from planes.wire.messages import EngineFacts, HandoverEndpoint, HandoverMode, RequestId, Role, WorkerId
from workers.answer.detokenizer import load_vocabulary
from workers.engine.base import EngineOutput
from workers.server import WorkerServer

VOCABULARY = load_vocabulary(Path("workers/sim/model/tokenizer.json"))
END = 259
TICKET = Ticket(WorkerId("p"), HandoverMode.PULL, num_tokens=3, lease_s=30.0, params=b"{}")


class FakeEngine:
    def __init__(self):
        self.facts = EngineFacts(
            block_size=16,
            num_blocks=8,
            context_length=64,
            max_batch=2,
            max_step_tokens=64,
            bytes_per_block=1,
            vocab_size=260,
        )
        self.endpoint = HandoverEndpoint(HandoverMode.PULL, "e", "127.0.0.1", 5000)
        self.running = {}
        self.submitted = []
        self.aborted = []
        self.refusal = None

    def submit(self, request, on_output):
        if self.refusal:
            raise self.refusal
        self.submitted.append(request)
        self.running[request.request] = on_output

    def abort(self, request):
        self.aborted.append(request)


class FakeConnection:
    def __init__(self):
        self.posted = []

    def post(self, item):
        self.posted.append(item)


class FakeTimer:
    def __init__(self, seconds, callback):
        self.seconds, self.callback, self.is_cancelled = seconds, callback, False

    def cancel(self):
        self.is_cancelled = True


class World:
    """A server between one gateway and a hand-driven engine."""

    def __init__(self, role=Role.BOTH, max_queued=2, parsers=None):
        self.engine, self.connection, self.timers = FakeEngine(), FakeConnection(), []
        self.server = WorkerServer(
            self.engine,
            role=role,
            vocabulary=VOCABULARY,
            end_tokens=frozenset({END}),
            max_queued=max_queued,
            call_later=self._call_later,
            parsers=parsers,
        )

    def _call_later(self, seconds, callback):
        self.timers.append(FakeTimer(seconds, callback))
        return self.timers[-1]

    def ask(
        self,
        stream=1,
        *,
        sampling=None,
        leg=None,
        resume=(),
        is_streaming=True,
        prompt=b"abc",
        parsing=None,
        connection=None,
    ):
        request = Generate(
            stream=stream,
            request=RequestId(f"r{stream}"),
            prompt=pack_tokens(list(prompt)),
            sampling=sampling or Sampling(max_tokens=10),
            format=Format("chat", "id", "m", 1, is_streaming=is_streaming, parsing=parsing),
            leg=leg or LocalLeg(),
            resume=pack_tokens(list(resume)),
            timeout_s=30.0,
        )
        self.server.generate(connection or self.connection, request)

    def expire(self, stream):
        for timer in self.timers:
            if timer.callback.args[0].request.stream == stream and not timer.is_cancelled:
                timer.callback()

    @property
    def answered(self):
        return {item.stream for item in self.posted if not isinstance(item, Delta)}

    def step(self, stream, tokens, finish=None, **measured):
        if f"r{stream}" not in self.engine.running:
            return  # it was never let in
        index = measured.pop("index", 0)
        self.engine.running[f"r{stream}"](EngineOutput(index, tuple(tokens), finish=finish, **measured))

    @property
    def posted(self):
        return self.connection.posted


def text(payload):
    chunks = [json.loads(line[6:]) for line in payload.decode().split("\n\n") if line and line != "data: [DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_each_step_becomes_a_delta_and_the_last_one_done():
    world = World()
    world.ask()
    world.step(1, b"H")
    world.step(1, b"i")
    world.step(
        1,
        [END],
        FinishReason.STOP,
        cached_tokens=2,
        queue_s=0.1,
        prefill_s=0.2,
        handover_s=0.3,
        handover_bytes=4,
        decode_s=0.5,
    )
    first, second, done = world.posted
    assert isinstance(first, Delta)
    assert (text(first.payload), first.tokens) == ("H", [72])
    assert (text(second.payload), second.tokens) == ("i", [105])
    assert isinstance(done, Done)
    assert done.payload.endswith(b"data: [DONE]\n\n")
    assert (done.reason, done.tokens, done.ticket) == (FinishReason.STOP, [END], None)
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 3, 2)
    assert (usage.queue_s, usage.prefill_s, usage.handover_s, usage.handover_bytes, usage.decode_s) == (
        0.1,
        0.2,
        0.3,
        4,
        0.5,
    )
    assert world.timers[0].is_cancelled
    assert world.server.num_requests == 0


def test_an_answer_that_is_not_streamed_sends_its_tokens_at_once_and_its_body_at_the_end():
    world = World()
    world.ask(is_streaming=False)
    world.step(1, b"H")
    world.step(1, b"i", FinishReason.LENGTH)
    delta, done = world.posted
    assert (delta.payload, delta.tokens) == (b"", [72])
    assert json.loads(done.payload)["choices"][0]["message"]["content"] == "Hi"


def test_a_stop_string_ends_the_answer_and_takes_the_request_from_the_engine():
    world = World()
    world.ask(sampling=Sampling(max_tokens=10, stop=["i"]))
    world.step(1, b"Hi", cached_tokens=1)
    (done,) = world.posted
    assert (done.reason, text(done.payload), done.usage.cached_tokens) == (FinishReason.STOP, "H", 1)
    assert world.engine.aborted == ["r1"]
    world.step(1, b"more", FinishReason.LENGTH)
    assert len(world.posted) == 1


def test_an_answer_with_several_choices_is_done_with_the_last_of_them():
    world = World()
    world.ask(sampling=Sampling(max_tokens=2, n=2))
    world.step(1, b"ab", FinishReason.LENGTH, index=1)
    world.step(1, b"cd", FinishReason.LENGTH)
    delta, done = world.posted
    assert isinstance(delta, Delta)
    assert done.usage.completion_tokens == 4


def test_a_cancelled_request_is_aborted_and_the_last_word_is_what_it_has_used():
    world = World()
    world.ask()
    world.step(1, b"H")
    world.server.cancel(world.connection, 1)
    assert world.engine.aborted == ["r1"]
    world.step(1, b"i", FinishReason.LENGTH)
    delta, done = world.posted
    assert isinstance(delta, Delta)
    assert (done.reason, done.payload, done.usage.completion_tokens) == (FinishReason.ABORT, b"", 1)
    assert world.timers[0].is_cancelled
    world.server.cancel(world.connection, 1)
    assert world.engine.aborted == ["r1"]
    assert len(world.posted) == 2


def test_a_gone_gateway_takes_only_its_own_requests_along():
    world, other = World(), FakeConnection()
    world.ask(1)
    world.ask(2)
    world.ask(3, connection=other)
    world.server.gone(world.connection)
    assert sorted(world.engine.aborted) == ["r1", "r2"]
    assert world.server.num_requests == 1


def test_a_stream_used_again_forgets_what_ran_there():
    world = World()
    world.ask(1)
    world.engine.running.clear()
    world.ask(1)
    assert world.engine.aborted == ["r1"]
    world.step(1, b"H", FinishReason.LENGTH)
    assert [type(item) for item in world.posted] == [Done]


@pytest.mark.parametrize(("has_begun", "kind"), [(False, FailureKind.REJECTED), (True, FailureKind.INTERRUPTED)])
def test_a_deadline_ends_the_request(has_begun, kind):
    world = World()
    world.ask()
    if has_begun:
        world.step(1, b"H")
    assert world.timers[0].seconds == 30.0
    world.timers[0].callback()
    failed = world.posted[-1]
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.code) == (kind, "deadline_exceeded")
    assert world.engine.aborted == ["r1"]


def test_what_only_the_engine_can_find_invalid_is_the_client_s_fault_and_keeps_its_words():
    world = World()
    world.ask()
    refusal = InvalidRequest("the regex has no end", param="response_format", code=UNUSABLE_GRAMMAR)
    world.step(1, (), FinishReason.ERROR, refusal=refusal)
    (failed,) = world.posted
    expected = (FailureKind.INVALID, UNUSABLE_GRAMMAR, "the regex has no end", "response_format")
    assert (failed.kind, failed.code, failed.message, failed.param) == expected
    assert world.server.num_requests == 0


def test_an_engine_error_interrupts_the_request_and_its_words_are_for_the_log_alone():
    world = World()
    world.ask()
    with capture_logs() as logs:
        world.step(1, (), FinishReason.ERROR, error="OSError: /srv/models/secret.safetensors")
    (failed,) = world.posted
    assert (failed.kind, failed.code) == (FailureKind.INTERRUPTED, "engine_error")
    assert "secret" not in failed.message
    assert logs[0]["reason"] == "OSError: /srv/models/secret.safetensors"


def test_more_requests_than_the_worker_takes_are_rejected():
    world = World(max_queued=1)
    for stream in range(1, 5):
        world.ask(stream)
    (failed,) = world.posted
    assert (failed.stream, failed.kind, failed.code) == (4, FailureKind.REJECTED, "worker_busy")
    assert "3 requests" in failed.message
    world.step(1, b"H", FinishReason.LENGTH)
    world.ask(5)
    assert len(world.engine.submitted) == 4


def test_a_draining_worker_finishes_what_it_has_and_rejects_the_rest():
    world = World()
    world.ask(1)
    world.server.drain()
    world.ask(2)
    world.step(1, b"H", FinishReason.LENGTH)
    failed, done = world.posted
    assert (failed.kind, failed.code) == (FailureKind.REJECTED, "worker_draining")
    assert isinstance(done, Done)


async def test_the_server_is_idle_once_the_last_request_has_ended():
    world = World()
    world.ask(1)
    world.server.interrupt_all("worker_stopped", "stopping")
    await world.server.until_idle()
    (failed,) = world.posted
    assert (failed.kind, failed.code) == (FailureKind.INTERRUPTED, "worker_stopped")


PROMPT, ANSWER = PrefillLeg(HandoverMode.PULL), DecodeLeg(ticket=TICKET)


async def test_a_change_of_role_holds_for_what_comes_and_not_for_what_runs():
    world = World(role=Role.DECODE)
    world.ask(1, leg=ANSWER)
    waiting = asyncio.ensure_future(world.server.until_within(Role.PREFILL))
    world.server.change_role(None)
    world.ask(2, leg=ANSWER)
    world.ask(3, leg=PROMPT)
    assert [(failed.stream, failed.code) for failed in world.posted] == [(2, "role_changed"), (3, "role_changed")]
    world.server.change_role(Role.PREFILL)
    world.ask(4, leg=PROMPT)
    await asyncio.sleep(0)
    assert (world.server.num_beyond(Role.PREFILL), world.server.num_beyond(Role.DECODE)) == (1, 1)
    assert not waiting.done()
    world.step(1, b"H", FinishReason.LENGTH)
    await waiting
    assert world.posted[-1].reason is FinishReason.LENGTH


def test_what_cannot_be_continued_elsewhere_is_not_moved():
    world = World(max_queued=9)
    world.ask(1)
    world.ask(2, sampling=Sampling(max_tokens=10, n=2))
    world.ask(3, sampling=Sampling(max_tokens=10, n=2), is_streaming=False)
    world.ask(4, leg=PROMPT)
    world.server.move_beyond(Role.PREFILL)
    assert [(failed.stream, failed.kind, failed.code) for failed in world.posted] == [
        (1, FailureKind.INTERRUPTED, "role_changed"),
        (3, FailureKind.INTERRUPTED, "role_changed"),
    ]
    assert world.engine.aborted == ["r1", "r3"]
    assert world.server.num_requests == 2


def test_a_kv_cache_that_waits_to_be_fetched_outlives_the_role():
    world = World(role=Role.PREFILL)
    prefill(world, is_emitting=True)
    world.server.change_role(Role.DECODE)
    world.server.move_beyond(Role.DECODE)
    assert world.engine.aborted == []
    assert [timer.seconds for timer in world.timers if not timer.is_cancelled] == [TICKET.lease_s]


def test_an_invalid_request_is_answered_with_its_field():
    world = World()
    world.ask(prompt=b"")
    (failed,) = world.posted
    assert (failed.kind, failed.code, failed.param) == (FailureKind.INVALID, "empty_prompt", "prompt")
    assert not world.engine.submitted


def test_a_request_that_the_engine_refuses_leaves_nothing_behind():
    world = World()
    world.engine.refusal = InvalidRequest("no", param="x")
    world.ask()
    assert world.posted == [Failed(1, FailureKind.INVALID, "invalid_request", "no", "x")]
    assert world.server.num_requests == 0
    assert world.timers[0].is_cancelled


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_defect_ends_its_own_request_and_nothing_of_it_is_left(has_begun):
    world = World()
    world.ask(1)
    begin = world.engine.submit

    def fail(request, on_output):
        if has_begun:
            begin(request, on_output)
        raise TypeError("unhashable type: 'list'")

    world.engine.submit = fail
    with capture_logs() as logs:
        world.ask(2)
    (failed,) = world.posted
    assert (failed.stream, failed.kind, failed.code) == (2, FailureKind.INTERRUPTED, "internal_error")
    assert "list" not in failed.message
    assert [(log["event"], log["request_id"], log["exc_info"]) for log in logs] == [("request.bug", "r2", True)]
    assert world.engine.aborted == ["r2"]
    assert [timer.is_cancelled for timer in world.timers] == [False, True]
    world.engine.submit = begin
    world.ask(2)
    assert world.server.num_requests == 2
    assert len(world.posted) == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [(InvalidRequest("no such effort"), FailureKind.INVALID), (ValueError("?"), FailureKind.INTERRUPTED)],
)
def test_a_parser_that_cannot_be_made_is_answered_and_nothing_has_begun(error, kind):
    class Refusing:
        def spelling(self, vocabulary):
            return vocabulary

        def maker(self, parsing, prompt):
            raise error

    world = World(parsers=Refusing())
    world.ask(parsing=Parsing(has_reasoning=True))
    (failed,) = world.posted
    assert failed.kind is kind
    assert (world.server.num_requests, world.engine.submitted, world.timers) == (0, [], [])


def test_one_request_id_runs_once_at_a_time():
    world, other = World(), FakeConnection()
    world.ask(1)
    world.ask(1, connection=other)
    assert other.posted[0].code == "duplicate_request"


# --- handover ---------------------------------------------------------------------------------------------------------


def prefill(
    world,
    *,
    is_emitting,
    tokens=b"H",
    finish=FinishReason.LENGTH,
    ticket=TICKET,
    mode=HandoverMode.PULL,
    connection=None,
    **sampling,
):
    world.engine.endpoint = HandoverEndpoint(mode, "e", "127.0.0.1", 5000)
    world.ask(
        leg=PrefillLeg(mode, emit_first=is_emitting),
        sampling=Sampling(**({"max_tokens": 10} | sampling)),
        connection=connection,
    )
    world.step(1, tokens, finish, ticket=ticket, cached_tokens=2, prefill_s=0.5)
    return (connection or world.connection).posted[-1]


def test_a_prefill_leg_answers_with_the_ticket_and_the_first_event():
    done = prefill(World(), is_emitting=True)
    assert (text(done.payload), done.tokens) == ("H", [72])
    assert b"[DONE]" not in done.payload
    assert b'"finish_reason":"' not in done.payload
    assert done.ticket.cached_tokens == 2
    assert done.ticket.params == TICKET.params
    assert done.usage.prefill_s == 0.5


def test_a_prefill_leg_that_emits_nothing_answers_with_the_ticket_alone():
    done = prefill(World(), is_emitting=False)
    assert (done.payload, done.tokens) == (b"", [])
    assert done.ticket is not None


@pytest.mark.parametrize(
    ("ending", "reason", "words"),
    [
        ({"tokens": [END], "finish": FinishReason.STOP}, FinishReason.STOP, ""),
        ({"max_tokens": 1}, FinishReason.LENGTH, "H"),
        ({"stop": ["H"]}, FinishReason.STOP, ""),
    ],
)
@pytest.mark.parametrize("is_emitting", [False, True])
def test_a_first_token_that_ends_the_request_completes_it_without_a_ticket(ending, reason, words, is_emitting):
    world = World()
    done = prefill(world, is_emitting=is_emitting, temperature=0.0, **ending)
    assert (done.ticket, done.reason, text(done.payload)) == (None, reason, words)
    assert done.payload.endswith(b"[DONE]\n\n")
    assert len(done.tokens) == 1
    assert world.engine.aborted == ["r1"]


def test_a_pushed_kv_cache_is_not_taken_back_when_its_first_token_ends_the_answer():
    """The decode worker has begun already and waits for it."""
    world = World()
    done = prefill(world, is_emitting=True, mode=HandoverMode.PUSH, stop=["H"])
    assert (done.ticket, done.reason) == (None, FinishReason.STOP)
    assert world.engine.aborted == []


@pytest.mark.parametrize(
    "ending", [{"tokens": b"H"}, {"stop": ["H"]}, {"tokens": [END]}, {"tokens": [END], "finish": FinishReason.STOP}]
)
def test_a_token_that_is_drawn_again_ends_nothing(ending):
    done = prefill(World(), is_emitting=False, **ending)
    assert (done.payload, done.tokens, done.reason) == (b"", [], FinishReason.LENGTH)
    assert done.ticket.params == TICKET.params


@pytest.mark.parametrize(
    "same", [{"temperature": 0.0}, {"seed": 1}, {"max_tokens": 1}], ids=["greedy", "seeded", "the only one"]
)
def test_a_token_that_would_be_drawn_the_same_may_end_the_request(same):
    done = prefill(World(), is_emitting=False, tokens=[END], finish=FinishReason.STOP, ticket=None, **same)
    assert (done.ticket, done.reason) == (None, FinishReason.STOP)


def test_an_engine_that_stops_without_a_ticket_has_answered():
    done = prefill(World(), is_emitting=False, tokens=[END], finish=FinishReason.STOP, ticket=None)
    assert (done.ticket, done.reason, done.tokens) == (None, FinishReason.STOP, [END])


def test_a_prefill_leg_may_bring_its_token_before_its_ticket():
    world = World()
    world.ask(leg=PrefillLeg(HandoverMode.PULL, emit_first=True))
    world.step(1, b"H")
    assert world.posted == []
    world.step(1, (), FinishReason.LENGTH, ticket=TICKET)
    (done,) = world.posted
    assert (text(done.payload), done.tokens) == ("H", [72])


def test_a_prefill_leg_without_a_ticket_is_interrupted():
    failed = prefill(World(), is_emitting=True, ticket=None)
    assert (failed.kind, failed.code) == (FailureKind.INTERRUPTED, "ticket_missing")


def test_a_decode_leg_reports_what_the_prefill_worker_had_cached():
    world = World()
    ticket = Ticket(WorkerId("p"), HandoverMode.PULL, num_tokens=3, lease_s=30.0, params=b"{}", cached_tokens=1)
    world.ask(leg=DecodeLeg(ticket=ticket))
    world.step(1, b"H", FinishReason.LENGTH, cached_tokens=3)
    assert world.posted[-1].usage.cached_tokens == 1


def test_a_cancel_that_crosses_the_ticket_gives_the_kv_cache_up():
    world = World()
    prefill(world, is_emitting=True)
    world.server.cancel(world.connection, 2)
    world.server.cancel(FakeConnection(), 1)
    assert world.engine.aborted == []
    world.server.cancel(world.connection, 1)
    assert world.engine.aborted == ["r1"]
    assert all(timer.is_cancelled for timer in world.timers)


def test_a_gone_gateway_s_kv_caches_are_given_up_before_their_leases_are_over():
    world, other = World(), FakeConnection()
    prefill(world, is_emitting=True)
    world.server.gone(other)
    assert [timer.seconds for timer in world.timers if not timer.is_cancelled] == [30.0]
    world.server.gone(world.connection)
    (timer,) = (timer for timer in world.timers if not timer.is_cancelled)
    assert (timer.seconds, world.engine.aborted) == (7.5, [])  # a decode worker may be fetching it
    timer.callback()
    assert world.engine.aborted == ["r1"]


def test_a_worker_that_hears_nobody_any_more_keeps_no_kv_cache_to_its_lease_s_end():
    """Jobs of the prefill queue have no connection that could be gone."""
    world = World()
    prefill(world, is_emitting=True)
    world.server.hear_no_more()
    (timer,) = (timer for timer in world.timers if not timer.is_cancelled)
    assert timer.seconds == 7.5
    timer.callback()
    assert world.engine.aborted == ["r1"]


def test_a_kv_cache_whose_lease_is_over_is_the_engine_s_again():
    world = World()
    prefill(world, is_emitting=True)
    (timer,) = (timer for timer in world.timers if not timer.is_cancelled)
    timer.callback()
    world.server.gone(world.connection)
    world.server.cancel(world.connection, 1)
    assert world.engine.aborted == []


def test_a_request_that_comes_again_is_not_given_up_with_its_earlier_kv_cache():
    world, other = World(), FakeConnection()
    prefill(world, is_emitting=True)
    world.engine.running.clear()
    world.ask(1, connection=other)
    world.server.gone(world.connection)
    world.server.cancel(world.connection, 1)
    assert world.engine.aborted == []
    assert world.server.num_requests == 1


# --- going on elsewhere -----------------------------------------------------------------------------------------------


def test_a_resumed_request_goes_on_after_what_the_client_has():
    world = World()
    world.ask(resume=b"H")
    assert world.engine.submitted[0].resume == (72,)
    world.step(1, b"i", FinishReason.LENGTH)
    (done,) = world.posted
    assert text(done.payload) == "i"
    assert b"assistant" not in done.payload
    assert done.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("resume", "sampling", "reason"),
    [
        (b"Hi", Sampling(max_tokens=2), FinishReason.LENGTH),
        (b"Hi", Sampling(max_tokens=9, stop=["Hi"]), FinishReason.STOP),
        ([72, END], Sampling(max_tokens=9), FinishReason.STOP),
    ],
)
def test_a_resumed_request_that_was_complete_is_done_at_once(resume, sampling, reason):
    world = World()
    world.ask(resume=resume, sampling=sampling)
    (done,) = world.posted
    assert (done.reason, text(done.payload)) == (reason, "")
    assert done.payload.endswith(b"[DONE]\n\n")
    assert done.usage.completion_tokens == len(resume)
    assert not world.engine.submitted


HAPPENINGS = {
    "step": lambda world, stream: world.step(stream, b"a"),
    "end": lambda world, stream: world.step(stream, b"a", FinishReason.LENGTH),
    "error": lambda world, stream: world.step(stream, (), FinishReason.ERROR),
    "expire": lambda world, stream: world.expire(stream),
    "cancel": lambda world, stream: world.server.cancel(world.connection, stream),
    "gone": lambda world, stream: world.server.gone(world.connection),
    "interrupt": lambda world, stream: world.server.interrupt_all("x", "x"),
}


@given(history=st.lists(st.tuples(st.sampled_from(["ask", *HAPPENINGS]), st.integers(1, 12)), max_size=40))
def test_whatever_happens_every_request_is_answered_once_unless_its_gateway_is_gone(history):
    world, asked, abandoned = World(max_queued=9), set(), set()
    for happening, stream in history:
        waiting = asked - abandoned - world.answered
        if happening == "ask" and stream not in asked:
            asked.add(stream)
            world.ask(stream)
        elif stream in asked and happening in HAPPENINGS:
            abandoned |= waiting & (asked if happening == "gone" else set())
            HAPPENINGS[happening](world, stream)
    world.server.interrupt_all("end", "end")
    answers = [item.stream for item in world.posted if not isinstance(item, Delta)]
    assert sorted(answers) == sorted(asked - abandoned)
    assert all(timer.is_cancelled for timer in world.timers)
    assert world.server.num_requests == 0


def test_a_released_request_is_taken_back_from_the_engine_unless_it_runs_here():
    world = World()
    world.ask(2)
    world.server.release(world.connection, RequestId("handed-over"))
    world.server.release(world.connection, RequestId("r2"))
    assert world.engine.aborted == ["handed-over"]
    assert world.server.num_requests == 1


def test_a_vector_is_all_of_its_answer():
    world = World()
    world.engine.facts = msgspec.structs.replace(world.engine.facts, embedding_size=2)
    layout = Format("embedding", "id", "m", 1)
    world.server.generate(
        world.connection, Generate(1, RequestId("r"), pack_tokens([1, 2, 3]), Sampling(max_tokens=1), layout)
    )
    assert world.engine.submitted[0].is_embedding
    output = EngineOutput(0, (), finish=FinishReason.STOP, embedding=b"12345678", cached_tokens=2)
    world.engine.running[RequestId("r")](output)
    (done,) = world.connection.posted
    assert (done.payload, done.tokens, done.reason) == (b"12345678", [], FinishReason.STOP)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (3, 0, 2)
    assert world.server.num_requests == 0
