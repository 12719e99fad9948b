"""An adopted server as an engine, against one that says what vLLM 0.32 says."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from planes.wire.errors import UNSUPPORTED, UNUSABLE_GRAMMAR, InvalidRequest
from planes.wire.frames import DecodeLeg, FinishReason, LocalLeg, PrefillLeg, Sampling, StructuredOutput
from planes.wire.messages import OWN_TOKENS, THINKING_BUDGET, BlocksStored, HandoverMode, RequestId, Role, WorkerId
from tests.unit.workers.adopted.vllm_server import KEPT, PATIENCE_S, VllmServer, chunk, error, streamed, usage, whole
from workers.adopted.engine import AdoptedEngine, AdoptOptions
from workers.adopted.examine import examine
from workers.adopted.handover import write_ticket
from workers.engine.base import EngineRequest, EngineStartError

N = 32
"""Tokens of the probe, and of the prompts here: eight blocks."""


def probe_answer(body):
    """To what an engine asks when it starts; None: it is no such request."""
    sampling = body["sampling_params"]
    if "request_id" in body:
        return None
    if "thinking_token_budget" in sampling:
        return 400, error(400, "thinking_token_budget is set but reasoning_config is not configured.")
    if body.get("stream"):
        return 200, streamed([*(chunk([7]) for _ in range(5)), chunk([7], "length")])
    return 200, whole([7], kept=KEPT if "kv_transfer_params" in body else None)


def answering(*answers):
    """Each answer in turn, to what is no probe."""
    left = list(answers)
    return lambda body: probe_answer(body) or left.pop(0)


class Reader:
    """Says that blocks were stored, as the probe's are."""

    def __init__(self, translator, replay, *, publisher):
        self.told = (replay, publisher)

    async def run(self, on_events):
        on_events([BlocksStored(bytes(8))])
        await asyncio.Event().wait()

    def close(self):
        pass


class Deaf(Reader):
    async def run(self, on_events):
        await asyncio.Event().wait()


@dataclass
class Observer:
    changes: list = field(default_factory=list)
    death: str = ""
    has_died: asyncio.Event = field(default_factory=asyncio.Event)

    def kv_changed(self, events):
        self.changes += events

    def stepped(self, sample):
        raise AssertionError("a server tells no steps")

    def died(self, reason):
        self.death = reason
        self.has_died.set()


@dataclass
class Told:
    """Outputs of one request."""

    outputs: list = field(default_factory=list)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, output):
        self.outputs.append(output)
        self.heard.set()
        if output.finish is not None:
            self.has_ended.set()

    async def end(self):
        await asyncio.wait_for(self.has_ended.wait(), PATIENCE_S)
        return self.outputs[-1]

    @property
    def tokens(self):
        return [token for output in self.outputs for token in output.tokens]


OPTIONS = {
    "worker": WorkerId("w"),
    "role": Role.BOTH,
    "has_handover": True,
    "vocab_size": 100,
    "vocabulary": [b"x"] * 100,
    "eos": (2,),
    "max_batch": 8,
    "max_step_tokens": 2048,
    "lease_s": 30,
    "bytes_per_token": 100,
    "watch_s": 0.01,
    "events_s": 5.0,
}


@contextlib.asynccontextmanager
async def running(*answers, reader=Reader, generate=None, **options):
    """An engine that has started, its server and its observer."""
    async with VllmServer(generate or answering(*answers)) as server:
        engine = AdoptedEngine(
            AdoptOptions(**(OPTIONS | options)), await examine(server.client()), server.client(), make_reader=reader
        )
        observer = Observer()
        try:
            await engine.start(observer, progress=lambda _: None)
            server.bodies.clear()
            yield engine, server, observer
        finally:
            await engine.stop()


def request(leg=None, *, name="r", resume=(), **sampling):
    sampling = Sampling(**({"max_tokens": 8, "temperature": 0.0} | sampling))
    leg = LocalLeg() if leg is None else leg
    return EngineRequest(RequestId(name), np.arange(N, dtype=np.uint32), sampling, leg, tuple(resume))


def ticket():
    return write_ticket(WorkerId("p"), KEPT, lease_s=30, now=time.time())


async def test_a_server_s_facts_are_what_it_says_and_what_a_probe_tells():
    async with running() as (engine, _, observer):
        facts, endpoint = engine.facts, engine.endpoint
        assert (facts.block_size, facts.num_blocks, facts.context_length) == (4, 68, 1024)
        assert (facts.max_batch, facts.bytes_per_block, facts.is_shortest_first) == (8, 400, False)
        assert set(facts.lacks) == {OWN_TOKENS, THINKING_BUDGET}
        assert facts.latency.step_fixed_s > 0
        assert (endpoint.engine_id, endpoint.host, endpoint.port) == (KEPT["remote_engine_id"], "10.0.0.7", 5600)
        assert engine.roles == tuple(Role)
        assert len(observer.changes) == 1


async def test_servers_of_one_kind_have_one_layout_and_others_another():
    async with running() as (one, _, _), running() as (same, _, _):
        assert one.layout == same.layout
    async with VllmServer(answering()) as server:
        server.models["data"] = [server.models["data"][0] | {"root": "/models/other"}]
        other = AdoptedEngine(
            AdoptOptions(**OPTIONS), await examine(server.client()), server.client(), make_reader=Reader
        )
        await other.start(Observer(), progress=lambda _: None)
        await other.stop()
    assert other.layout != one.layout


async def test_a_server_with_a_reasoning_parser_takes_budgets():
    def generate(body):
        has_budget = "thinking_token_budget" in body["sampling_params"]
        return (200, whole([7])) if has_budget else probe_answer(body)

    async with running(generate=generate) as (engine, _, _):
        assert engine.facts.lacks == (OWN_TOKENS,)


async def test_a_server_without_the_connector_is_told_to_have_one():
    def generate(body):
        status, answer = probe_answer(body)
        return status, (answer | {"kv_transfer_params": None} if isinstance(answer, dict) else answer)

    with pytest.raises(EngineStartError, match=r"--kv-transfer-config '.*NixlConnector.*--handover none"):
        async with running(generate=generate):
            pass
    async with running(generate=generate, has_handover=False) as (engine, _, _):
        assert (engine.endpoint, engine.layout, engine.roles) == (None, "", ())


@pytest.mark.parametrize(
    "kept",
    [{"transfer_mode": "push"}, {"remote_num_tokens": 31}, {"remote_block_ids": [[1, 2]]}, {"remote_port": "x"}],
)
async def test_a_handover_of_another_kind_is_refused_at_the_start(kept):
    def generate(body):
        status, answer = probe_answer(body)
        if isinstance(answer, dict) and answer.get("kv_transfer_params"):
            answer["kv_transfer_params"] = KEPT | kept
        return status, answer

    with pytest.raises(EngineStartError, match="--handover"):
        async with running(generate=generate):
            pass


@pytest.mark.parametrize(("num_merged", "is_adopted"), [(2, True), (3, False)])
async def test_a_server_that_has_sent_all_tokens_at_once_is_asked_again(num_merged, is_adopted):
    merged = [streamed([chunk([7] * 6, "length")]) for _ in range(num_merged)]

    def generate(body):
        return (200, merged.pop()) if body.get("stream") and merged else probe_answer(body)

    refused = contextlib.nullcontext() if is_adopted else pytest.raises(EngineStartError, match="without a pause")
    with refused:
        async with running(generate=generate):
            pass


async def test_a_server_whose_events_do_not_arrive_is_refused():
    with pytest.raises(EngineStartError, match=r"no KV events came from tcp://127\.0\.0\.1:15557"):
        async with running(reader=Deaf, events_s=0.05):
            pass


async def test_tokens_are_streamed():
    said = streamed([chunk([5]), chunk([6, 7]), chunk([2], "stop"), usage(16)])
    async with running((200, said)) as (engine, server, _):
        engine.submit(request(), told := Told())
        last = await told.end()
        assert (told.tokens, last.finish, last.cached_tokens) == ([5, 6, 7, 2], FinishReason.STOP, 16)
        assert server.bodies[0]["token_ids"] == list(range(N))


async def test_a_prefill_leg_ends_with_a_ticket():
    async with running((200, whole([5], cached=8, kept=KEPT))) as (engine, server, _):
        engine.submit(request(PrefillLeg(HandoverMode.PULL)), told := Told())
        last = await told.end()
        assert (last.tokens, last.ticket.num_tokens, last.cached_tokens) == ((5,), N, 8)
        assert server.bodies[0]["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}


async def test_a_prompt_whose_first_token_ends_the_answer_is_not_handed_over():
    async with running((200, whole([2], "stop", kept=KEPT))) as (engine, _, _):
        engine.submit(request(PrefillLeg(HandoverMode.PULL)), told := Told())
        assert (await told.end()).ticket is None


async def test_a_decode_leg_goes_on_from_the_token_that_the_client_has():
    said = streamed([chunk([5]), chunk([6]), chunk([7], "length"), usage(0)])
    async with running((200, said)) as (engine, server, _):
        engine.submit(request(DecodeLeg(ticket()), resume=(5,)), told := Told())
        await told.end()
        assert told.tokens == [6, 7]
        assert server.bodies[0]["kv_transfer_params"] == KEPT


async def test_after_a_near_tie_the_client_s_token_is_continued():
    other = streamed([chunk([9]), chunk([8]), chunk([8], "length"), usage(0)])
    again = streamed([chunk([6]), chunk([7], "length"), usage(0)])
    async with running((200, other), (200, again)) as (engine, server, _):
        engine.submit(request(DecodeLeg(ticket()), resume=(5,)), told := Told())
        assert (await told.end()).error == ""
        assert told.tokens == [6, 7]
        first, second = server.bodies
        assert (second["token_ids"], second["sampling_params"]["max_tokens"]) == ([*range(N), 5], 7)
        assert "kv_transfer_params" not in second
        assert first["request_id"] != second["request_id"]


async def test_aborting_closes_the_connection():
    async with running((200, [chunk([5]), asyncio.Event()])) as (engine, server, _):
        engine.submit(request(), told := Told())
        await asyncio.wait_for(told.heard.wait(), PATIENCE_S)
        assert engine.load().num_running == 1
        engine.abort(RequestId("r"))
        await asyncio.wait_for(server.closed.wait(), PATIENCE_S)
        assert (engine.load().num_running, engine.load().kv_tokens) == (0, 0)
        assert not told.has_ended.is_set()
        engine.abort(RequestId("nobody"))


async def test_the_load_is_what_runs_and_waits_here_and_what_others_have():
    async with running((200, [chunk([5]), asyncio.Event()]), (200, [asyncio.Event()])) as (engine, server, _):
        engine.submit(request(), told := Told())
        await asyncio.wait_for(told.heard.wait(), PATIENCE_S)
        engine.submit(request(name="r2"), Told())
        while not server.looks.empty():
            server.looks.get_nowait()
        for _ in range(2):  # with the second, what the metrics said after the first has been taken in
            await asyncio.wait_for(server.looks.get(), PATIENCE_S)
        load = engine.load()
        assert (load.num_running, load.num_waiting) == (1 + 1, 1)  # three there, two of them ours
        assert (load.waiting_prefill_tokens, load.kv_tokens, load.free_blocks) == (N, N + 1, 51)


@pytest.mark.parametrize(
    "answer",
    [
        (500, error(500, "Internal server error")),
        (200, [chunk([5]), None]),
        (200, streamed([chunk([5]), error(500, "KV load failed")])),
        (200, streamed([chunk([5])])),
        (200, [b"{", b"[DONE]"]),
        (200, [chunk([5])]),
    ],
)
async def test_a_request_that_the_server_drops_has_failed(answer):
    async with running(answer) as (engine, _, _):
        engine.submit(request(), told := Told())
        last = await told.end()
        assert (last.finish, last.refusal) == (FinishReason.ERROR, None)
        assert last.error


@pytest.mark.parametrize(("param", "code"), [("logprobs", UNSUPPORTED), (None, "invalid_request")])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_what_the_server_finds_wrong_is_the_client_s_fault_if_it_names_a_parameter(is_streamed, param, code):
    wrong = error(400, "bad", param)
    answer = (200, streamed([wrong])) if is_streamed else (400, wrong)
    async with running(answer, answer) as (engine, _, _):
        engine.submit(request(), told := Told())
        refusal = (await told.end()).refusal
        assert (str(refusal), refusal.param, refusal.code) == ("bad", param, code)
        engine.submit(request(name="r2", structured=StructuredOutput(regex="[a")), told := Told())
        assert (await told.end()).refusal.code == UNUSABLE_GRAMMAR


async def test_an_error_amid_an_answer_is_not_the_request_s_fault():
    async with running((200, streamed([chunk([5]), error(400, "bad", "logprobs")]))) as (engine, _, _):
        engine.submit(request(), told := Told())
        last = await told.end()
        assert (last.finish, last.refusal) == (FinishReason.ERROR, None)
        assert "bad" in last.error


async def test_what_must_not_reach_the_server_is_refused_before():
    async with running((200, [asyncio.Event()])) as (engine, _, _):
        with pytest.raises(InvalidRequest, match="simulated"):
            engine.submit(request(script=b"1234"), Told())
        engine.submit(request(), Told())
        with pytest.raises(InvalidRequest, match="runs here already"):
            engine.submit(request(), Told())
        with pytest.raises(InvalidRequest):
            engine.submit(request(DecodeLeg(), name="r2"), Told())


async def test_a_ticket_that_is_too_old_fails_its_leg_unasked():
    old = write_ticket(WorkerId("p"), KEPT, lease_s=30, now=0.0)
    async with running() as (engine, server, _):
        engine.submit(request(DecodeLeg(old)), told := Told())
        assert "lease" in (await told.end()).error
        assert server.bodies == []


async def test_a_server_that_is_gone_takes_the_worker_along():
    async with running((200, [chunk([5]), asyncio.Event()])) as (engine, server, observer):
        engine.submit(request(), told := Told())
        await asyncio.wait_for(told.heard.wait(), PATIENCE_S)
        await server.stop()
        assert (await told.end()).finish is FinishReason.ERROR
        await asyncio.wait_for(observer.has_died.wait(), PATIENCE_S)
    assert "the vLLM server is gone" in observer.death


async def test_a_server_whose_engine_died_takes_the_worker_along():
    async with running() as (_, server, observer):
        server.health = 503
        await asyncio.wait_for(observer.has_died.wait(), PATIENCE_S)
    assert "503" in observer.death


async def test_stopping_ends_what_runs_and_is_no_death():
    async with running((200, [chunk([5]), asyncio.Event()])) as (engine, server, observer):
        engine.submit(request(), told := Told())
        await asyncio.wait_for(told.heard.wait(), PATIENCE_S)
        await engine.stop()
        await asyncio.wait_for(server.closed.wait(), PATIENCE_S)
    assert observer.death == ""
