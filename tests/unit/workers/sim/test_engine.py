"""The simulated engine: requests in, tokens out, tickets and leases, on a clock that runs a million times faster."""

import asyncio
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from planes.wire.blocks import unpack
from planes.wire.errors import InvalidRequest
from planes.wire.frames import (
    DecodeLeg,
    Delta,
    FinishReason,
    Format,
    Generate,
    PrefillLeg,
    Sampling,
    StreamId,
    StructuredOutput,
    Ticket,
    pack_tokens,
)
from planes.wire.messages import (
    BlocksStored,
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    LatencyPrior,
    RequestId,
    Role,
    WorkerId,
)
from workers.answer.detokenizer import load_vocabulary
from workers.engine.base import EngineRequest, EngineStartError
from workers.server import WorkerServer
from workers.settings import SIM_MODEL
from workers.sim.engine import SimEngine, SimOptions
from workers.sim.handover import Offer
from workers.sim.options import faster
from workers.sim.side_channel import HandoverFailed
from workers.sim.tokens import EOS, VOCAB_SIZE

FACTS = EngineFacts(
    block_size=4,
    num_blocks=64,
    context_length=128,
    max_batch=8,
    max_step_tokens=64,
    bytes_per_block=64,
    vocab_size=320,
)
PROMPT = np.arange(97, 107, dtype=np.uint32)


@dataclass
class Wire:
    """Where the fake transfers of one test meet."""

    offers: dict = field(default_factory=dict)
    withdrawn: list = field(default_factory=list)
    failure: str = ""
    is_open: asyncio.Event = field(default_factory=asyncio.Event)


class FakeTransfer:
    """Hands words over within the process; with `wire.is_open` unset, nothing moves."""

    def __init__(self, wire, pool, mode, engine_id):
        self.wire, self.pool = wire, pool
        self.endpoint = HandoverEndpoint(mode, engine_id, "127.0.0.1", 1)
        self.is_stopped = False

    async def start(self):
        pass

    def offer(self, request, blocks, on_taken):
        self.wire.offers[request] = (self.pool, list(blocks), on_taken)
        return request.encode() + bytes([len(blocks)])

    def withdraw(self, request):
        self.wire.offers.pop(request, None)
        self.wire.withdrawn.append(request)
        return True

    def parse(self, params):
        if not params:
            raise InvalidRequest("the ticket's params are malformed", param="ticket")
        return Offer("e", "h", 1, params[:-1].decode(), bytes(4 * params[-1]), 64)

    async def receive(self, source, request, blocks, total, *, timeout_s):
        await self.wire.is_open.wait()
        if self.wire.failure:
            raise HandoverFailed(self.wire.failure)
        while request not in self.wire.offers:  # noqa: ASYNC110 - a fake of waiting for a push
            await asyncio.sleep(0)
        pool, theirs, on_taken = self.wire.offers.pop(request)
        assert len(theirs) == total
        self.pool.write(list(blocks), pool.read(theirs[total - len(blocks) :]))
        on_taken()

    async def stop(self):
        self.is_stopped = True


class Observer:
    def __init__(self):
        self.held, self.samples = set(), []

    def kv_changed(self, events):
        for event in events:
            names = set(unpack(event.hashes).tolist())
            self.held = self.held | names if isinstance(event, BlocksStored) else self.held - names

    def stepped(self, sample):
        self.samples.append(sample)

    def died(self, reason):
        pytest.fail(reason)


class Client:
    """One request's outputs."""

    def __init__(self, engine, request, prompt=PROMPT, *, leg=None, resume=(), **sampling):
        sampling = {"max_tokens": 6, "ignore_eos": True} | sampling
        self.outputs = []
        self.open = sampling.get("n", 1)
        self.ended = asyncio.Event()
        more = {} if leg is None else {"leg": leg}
        engine.submit(
            EngineRequest(RequestId(request), prompt, Sampling(**sampling), resume=tuple(resume), **more), self.take
        )

    def take(self, output):
        assert not self.ended.is_set()
        self.outputs.append(output)
        self.open -= output.finish is not None
        if not self.open or output.finish is FinishReason.ERROR:
            self.ended.set()

    async def done(self):
        async with asyncio.timeout(60):
            await self.ended.wait()
        return self

    def tokens(self, index=0):
        return [token for output in self.outputs if output.index == index for token in output.tokens]

    @property
    def last(self):
        return self.outputs[-1]


@pytest.fixture
def wire():
    wire = Wire()
    wire.is_open.set()
    return wire


class ObservedEngine(SimEngine):
    observer: Observer


@pytest.fixture
async def make_engine(wire):
    engines = []

    async def make(mode=HandoverMode.PULL, **changes):
        def make_transfer(pool, *, mode, engine_id, host, bind_host):
            return FakeTransfer(wire, pool, mode, engine_id)

        options = {"worker": WorkerId("w"), "model": "m", "facts": FACTS, "handover": mode, "speedup": 1e6}
        engine = ObservedEngine(SimOptions(**(options | changes)), make_transfer=make_transfer)
        engine.observer = Observer()
        await engine.start(engine.observer, progress=lambda _: None)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        for request in list(engine._leases):
            engine.abort(request)
        await engine.stop()
        assert engine._core.load().free_blocks == FACTS.num_blocks
        assert engine.observer.held == set(engine._core.cached_names().tolist())
        if engine._transfer is not None:
            assert engine._transfer.is_stopped  # type: ignore[attr-defined]  # a FakeTransfer


async def test_an_answer_comes_token_by_token_and_ends_with_what_was_measured(make_engine):
    engine = await make_engine()
    client = await Client(engine, "r").done()
    assert [len(output.tokens) for output in client.outputs] == [1] * 6
    assert client.last.finish is FinishReason.LENGTH
    assert client.last.prefill_s > 0
    assert client.last.decode_s > 0
    assert client.last.cached_tokens == 0
    assert (await Client(engine, "again").done()).last.cached_tokens == 8
    assert engine.observer.samples[0].prefill_tokens == 10


async def test_all_engines_of_one_model_and_seed_say_the_same(make_engine):
    answers = [(await Client(await make_engine(), "r", max_tokens=12).done()).tokens() for _ in range(2)]
    assert answers[0] == answers[1]
    other = await Client(await make_engine(seed=1), "r", max_tokens=12).done()
    assert other.tokens() != answers[0]


async def test_outputs_of_one_step_come_in_one_turn(make_engine):
    engine = await make_engine()
    clients = [Client(engine, f"r{i}") for i in range(4)]
    for client in clients:
        await client.done()
    assert engine.observer.samples[-1].batch == 4
    assert len(engine.observer.samples) == 6


async def test_choices_differ_and_share_the_prompt(make_engine):
    engine = await make_engine()
    client = await Client(engine, "r", n=3, max_tokens=16).done()
    assert len({tuple(client.tokens(index)) for index in range(3)}) == 3
    assert sum(output.finish is not None for output in client.outputs) == 3


async def test_the_seed_picks_the_stream(make_engine):
    engine = await make_engine()
    one, two, one_again = [await Client(engine, "r", seed=seed, max_tokens=12).done() for seed in (1, 2, 1)]
    assert one.tokens() == one_again.tokens() != two.tokens()


async def test_a_resumed_stream_goes_on_where_it_was(make_engine):
    engine = await make_engine()
    whole = (await Client(engine, "r", max_tokens=12).done()).tokens()
    rest = await Client(await make_engine(), "r", max_tokens=12, resume=whole[:5]).done()
    assert whole[:5] + rest.tokens() == whole


async def test_logprobs_are_the_same_for_the_same_context_and_lead_with_the_token(make_engine):
    engine = await make_engine()
    first = await Client(engine, "a", logprobs=3).done()
    second = await Client(engine, "b", logprobs=3).done()
    assert [output.logprobs for output in first.outputs] == [output.logprobs for output in second.outputs]
    for output in first.outputs:
        (logprob,) = output.logprobs
        assert logprob.token == output.tokens[0] == logprob.top[0][0]
        assert logprob.top[0][1] == logprob.logprob < 0
        assert [value for _, value in logprob.top] == sorted((value for _, value in logprob.top), reverse=True)
        assert len({token for token, _ in logprob.top}) == 3
    none = await Client(engine, "c", logprobs=0).done()
    assert none.last.logprobs[0].top == ()


@pytest.mark.parametrize("max_tokens", [1, 6])
async def test_prompt_logprobs_come_once_one_for_each_token(make_engine, max_tokens):
    engine = await make_engine()
    client = await Client(engine, "a", prompt_logprobs=2, max_tokens=max_tokens).done()
    first, *others = [output.prompt_logprobs for output in client.outputs]
    assert first[0] is None
    assert [logprob.token for logprob in first[1:]] == PROMPT.tolist()[1:]
    assert {len(logprob.top) for logprob in first[1:]} == {2}
    assert not any(others)
    again = await Client(engine, "b", prompt_logprobs=2).done()
    assert again.outputs[0].prompt_logprobs == first
    assert not any(output.prompt_logprobs for output in (await Client(engine, "c").done()).outputs)


async def test_an_answer_ends_by_itself_only_if_the_client_lets_it(make_engine):
    engine = await make_engine(answer_tokens=4)
    natural = await Client(engine, "a", max_tokens=100, ignore_eos=False).done()
    forced = await Client(engine, "b", max_tokens=100, ignore_eos=True).done()
    assert natural.last.finish is FinishReason.STOP
    assert natural.last.tokens == (256,)
    assert len(forced.tokens()) == 100


async def test_an_aborted_request_is_not_heard_of_again(make_engine):
    engine = await make_engine()
    first, second = Client(engine, "a", max_tokens=50), Client(engine, "b", max_tokens=50)

    def abort_the_other(output):
        if len(first.outputs) == 5:
            engine.abort(RequestId("b"))
        Client.take(first, output)

    engine._runs["a"].on_output = abort_the_other
    for choice in engine._runs["a"].choices.values():
        choice.on_output = abort_the_other
    await first.done()
    assert not second.ended.is_set()
    assert len(second.outputs) == 5
    engine.abort(RequestId("nobody"))


async def test_a_request_id_may_be_used_again_at_once_after_an_abort(make_engine):
    engine = await make_engine()
    Client(engine, "r", max_tokens=50)
    await asyncio.sleep(0)
    engine.abort(RequestId("r"))
    assert len((await Client(engine, "r").done()).tokens()) == 6


async def test_an_idle_engine_has_no_timer(make_engine):
    engine = await make_engine()
    assert engine._timer is None
    await Client(engine, "r").done()
    await asyncio.sleep(0)
    assert engine._timer is None


async def test_a_failing_listener_does_not_stop_the_engine(make_engine):
    engine = await make_engine()
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))

    def fail(_):
        raise KeyError("a bug of somebody")

    engine.submit(EngineRequest(RequestId("bad"), PROMPT, Sampling(max_tokens=2, ignore_eos=True)), fail)
    await Client(engine, "good", max_tokens=20).done()
    assert {type(error) for error in errors} == {KeyError}


async def test_a_script_is_said_and_then_the_answer_ends_resumed_and_handed_over_too(make_engine):
    told = {"script": pack_tokens([7, 8, 9, 10, 11]), "max_tokens": 12}
    whole = await Client(await make_engine(), "r", **told).done()
    assert (whole.tokens(), whole.last.finish) == ([7, 8, 9, 10, 11, EOS], FinishReason.STOP)
    rest = await Client(await make_engine(), "r", resume=[7, 8, 9], **told).done()
    assert rest.tokens() == [10, 11, EOS]
    prefill, decode = await make_engine(), await make_engine()
    first = await Client(prefill, "h", leg=PrefillLeg(HandoverMode.PULL), **told).done()
    leg = DecodeLeg(ticket=first.last.ticket)
    assert first.tokens() == [7]
    assert (await Client(decode, "h", leg=leg, **told).done()).tokens() == whole.tokens()
    cut = await Client(await make_engine(), "r", **(told | {"max_tokens": 3})).done()
    assert (cut.tokens(), cut.last.finish) == ([7, 8, 9], FinishReason.LENGTH)


async def test_an_answer_that_must_match_a_schema_does_and_a_regex_is_refused(make_engine):
    engine = await make_engine(facts=msgspec.structs.replace(FACTS, vocab_size=VOCAB_SIZE))
    schema = StructuredOutput(json_schema='{"type": "array", "items": {"const": 1}, "minItems": 2}')
    answer = await Client(engine, "r", structured=schema, max_tokens=20).done()
    assert bytes(answer.tokens()[:-1]) == b"[1,1]"
    with pytest.raises(InvalidRequest, match="no text for a regex"):
        Client(engine, "x", structured=StructuredOutput(regex="a"))


# --- handover --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(HandoverMode))
@pytest.mark.parametrize("length", [1, 4, 10])
async def test_a_handed_over_answer_is_the_one_that_one_engine_gives(make_engine, mode, length):
    prompt = PROMPT[:length]
    whole = (await Client(await make_engine(), "x", prompt, max_tokens=12).done()).tokens()
    prefill, decode = await make_engine(mode), await make_engine(mode)
    first = await Client(prefill, "r", prompt, leg=PrefillLeg(mode), max_tokens=12).done()
    ticket = first.last.ticket
    assert (ticket.worker, ticket.mode, ticket.num_tokens) == ("w", mode, length)
    assert prefill.load().free_blocks < FACTS.num_blocks
    leg = DecodeLeg(ticket=ticket) if mode is HandoverMode.PULL else DecodeLeg(source=prefill.endpoint)
    second = await Client(decode, "r", prompt, leg=leg, max_tokens=12).done()
    assert first.tokens() == whole[:1]
    assert second.tokens() == whole
    assert second.last.handover_bytes == -(-length // 4) * 64
    assert second.last.handover_s > 0
    assert prefill.load().free_blocks == FACTS.num_blocks


async def test_a_push_may_be_announced_before_the_prompt_is_computed(make_engine):
    prefill, decode = await make_engine(HandoverMode.PUSH), await make_engine(HandoverMode.PUSH)
    second = Client(decode, "r", leg=DecodeLeg(source=prefill.endpoint))
    await asyncio.sleep(0)
    first = await Client(prefill, "r", leg=PrefillLeg(HandoverMode.PUSH)).done()
    await second.done()
    assert second.tokens()[:1] == first.tokens()


async def test_a_decode_leg_may_bring_the_first_token_along(make_engine):
    whole = (await Client(await make_engine(), "x").done()).tokens()
    prefill, decode = await make_engine(), await make_engine()
    first = await Client(prefill, "r", leg=PrefillLeg(HandoverMode.PULL)).done()
    second = await Client(decode, "r", leg=DecodeLeg(ticket=first.last.ticket), resume=first.tokens()).done()
    assert first.tokens() + second.tokens() == whole


async def test_a_failed_handover_ends_the_request_with_its_reason_and_frees_its_blocks(make_engine, wire):
    prefill, decode = await make_engine(), await make_engine()
    first = await Client(prefill, "r", leg=PrefillLeg(HandoverMode.PULL)).done()
    wire.failure = "the cable is cut"
    second = await Client(decode, "r", leg=DecodeLeg(ticket=first.last.ticket)).done()
    assert second.last.finish is FinishReason.ERROR
    assert second.last.error == "the cable is cut"
    assert decode.load().free_blocks == FACTS.num_blocks


async def test_blocks_of_an_aborted_decode_leg_are_kept_until_nothing_writes_to_them(make_engine, wire):
    prefill, decode = await make_engine(), await make_engine()
    first = await Client(prefill, "r", leg=PrefillLeg(HandoverMode.PULL)).done()
    wire.is_open.clear()
    second = Client(decode, "r", leg=DecodeLeg(ticket=first.last.ticket))
    await asyncio.sleep(0)
    (handover,) = decode._handovers
    decode.abort(RequestId("r"))
    assert decode.load().free_blocks == FACTS.num_blocks - 3
    await asyncio.wait([handover])
    assert decode.load().free_blocks == FACTS.num_blocks
    assert second.outputs == []
    wire.is_open.set()


@pytest.mark.parametrize("is_begun", [False, True])
async def test_a_decode_leg_that_is_given_up_tells_the_prefill_worker_not_to_wait(make_engine, wire, is_begun):
    prefill, decode = await make_engine(lease_s=30.0), await make_engine()
    first = await Client(prefill, "r", leg=PrefillLeg(HandoverMode.PULL)).done()
    assert prefill.load().free_blocks < FACTS.num_blocks
    wire.is_open.clear()
    Client(decode, "r", leg=DecodeLeg(ticket=first.last.ticket))
    if is_begun:
        await asyncio.sleep(0)
    decode.abort(RequestId("r"))
    wire.is_open.set()
    await asyncio.gather(*decode._handovers, return_exceptions=True)
    assert prefill.load().free_blocks == FACTS.num_blocks


async def test_an_abort_gives_up_what_a_ticket_promised(make_engine, wire):
    prefill = await make_engine()
    await Client(prefill, "r", leg=PrefillLeg(HandoverMode.PULL)).done()
    prefill.abort(RequestId("r"))
    assert wire.offers == {}
    assert prefill.load().free_blocks == FACTS.num_blocks


async def test_a_prefill_leg_aborted_halfway_is_given_up_for_whoever_waits_for_its_push(make_engine, wire):
    prefill = await make_engine(HandoverMode.PUSH)
    Client(prefill, "r", leg=PrefillLeg(HandoverMode.PUSH))
    prefill.abort(RequestId("r"))
    assert wire.withdrawn == ["r"]


class Gateway:
    """A connection, as the server of the streams sees it."""

    def __init__(self):
        self.ended = asyncio.Event()

    def post(self, item):
        if not isinstance(item, Delta):
            self.done = item
            self.ended.set()


LEAVING = {
    "released": lambda server, gateway: server.release(gateway, RequestId("long")),
    "cancelled while the ticket was on its way": lambda server, gateway: server.cancel(gateway, StreamId(1)),
    "lost": lambda server, gateway: server.gone(gateway),
}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING)
async def test_five_abandoned_prompts_pin_nothing(make_engine, wire, leave):
    engine, timers = await make_engine(lease_s=30.0), []

    def call_later(seconds, callback):
        timers.append((seconds, callback))
        return asyncio.get_running_loop().call_later(1e6, callback)

    vocabulary = load_vocabulary(SIM_MODEL / "tokenizer.json").covering(FACTS.vocab_size)
    server = WorkerServer(
        engine, role=Role.PREFILL, vocabulary=vocabulary, end_tokens=frozenset(), max_queued=9, call_later=call_later
    )
    for seed in range(5):
        gateway = Gateway()
        server.generate(
            gateway,
            Generate(
                StreamId(1),
                RequestId("long"),
                pack_tokens([97 + seed] * 100),
                Sampling(max_tokens=9, ignore_eos=True),
                Format("chat", "i", "m", 0, is_streaming=True),
                PrefillLeg(HandoverMode.PULL),
            ),
        )
        async with asyncio.timeout(60):
            await gateway.ended.wait()
        assert gateway.done.ticket is not None
        assert engine.load().free_blocks == FACTS.num_blocks - 25
        leave(server, gateway)
        seconds, callback = timers[-1]
        if seconds < 30.0:
            callback()  # long before the lease is over
        assert engine.load().free_blocks == FACTS.num_blocks
        assert not engine._leases
        assert not wire.offers


async def test_a_lease_runs_out(make_engine, wire):
    prefill = await make_engine(lease_s=0.001)
    await Client(prefill, "r", leg=PrefillLeg(HandoverMode.PULL)).done()
    await prefill.stop()  # waits for it
    assert wire.offers == {}
    assert prefill.load().free_blocks == FACTS.num_blocks


async def test_a_prefill_leg_ended_by_its_first_token_gives_no_ticket(make_engine):
    prefill = await make_engine()
    everything = list(range(320))
    leg = PrefillLeg(HandoverMode.PULL, emit_first=True)
    client = await Client(prefill, "r", leg=leg, stop_token_ids=everything).done()
    assert client.last.finish is FinishReason.STOP
    assert client.last.ticket is None


async def test_a_token_that_is_drawn_again_does_not_end_a_prefill_leg(make_engine):
    prefill = await make_engine()
    client = await Client(
        prefill, "r", leg=PrefillLeg(HandoverMode.PULL), stop_token_ids=list(range(320)), max_tokens=2
    ).done()
    assert client.last.finish is FinishReason.LENGTH
    assert client.last.ticket is not None


async def test_the_first_output_says_what_is_known_by_then(make_engine):
    engine = await make_engine()
    client = await Client(engine, "r").done()
    first, last = client.outputs[0], client.last
    assert first.prefill_s == last.prefill_s > 0
    assert (first.queue_s, first.cached_tokens, first.decode_s) == (last.queue_s, last.cached_tokens, 0.0)


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"leg": DecodeLeg()}, "neither a ticket nor a source"),
        ({"leg": DecodeLeg(ticket=Ticket(WorkerId("p"), HandoverMode.PULL, 10, 1.0, b""))}, "malformed"),
        ({"leg": DecodeLeg(ticket=Ticket(WorkerId("p"), HandoverMode.PULL, 10, 1.0, b"r\x01"))}, "names 1 blocks"),
        ({"leg": PrefillLeg(HandoverMode.PULL), "n": 2}, "one choice"),
    ],
)
async def test_what_must_not_reach_the_engine_is_refused(make_engine, more, message):
    engine = await make_engine()
    with pytest.raises(InvalidRequest, match=message):
        Client(engine, "r", **more)
    assert engine.load().num_waiting == 0


async def test_an_engine_without_handover_refuses_its_legs(make_engine):
    engine = await make_engine(None)
    assert engine.endpoint is None
    with pytest.raises(InvalidRequest, match="hands no KV cache over"):
        Client(engine, "r", leg=PrefillLeg(HandoverMode.PULL))
    assert len((await Client(engine, "r").done()).tokens()) == 6


@pytest.mark.parametrize("changes", [{"context_length": 1000}, {"bytes_per_block": 12}, {"num_blocks": 1 << 50}])
async def test_facts_that_make_no_engine_are_said_at_the_start(changes):
    values = {name: getattr(FACTS, name) for name in FACTS.__struct_fields__} | changes
    engine = SimEngine(SimOptions(worker=WorkerId("w"), model="m", facts=EngineFacts(**values)))
    with pytest.raises(EngineStartError, match="cannot start"):
        await engine.start(Observer(), progress=lambda _: None)


def test_a_faster_clock_divides_seconds_and_multiplies_bytes_per_second():
    speed = LatencyPrior()
    double = faster(speed, 2.0)
    for name in LatencyPrior.__struct_fields__:
        factor = 2.0 if name == "handover_bytes_per_s" else 0.5
        assert getattr(double, name) == getattr(speed, name) * factor
    with pytest.raises(EngineStartError, match="speedup is 0"):
        faster(speed, 0)


def test_the_layout_is_that_of_the_blocks():
    def layout(**changes):
        facts = msgspec.structs.replace(FACTS, **changes)
        return SimEngine(SimOptions(worker=WorkerId("w"), model="m", facts=facts)).layout

    assert layout() == layout(num_blocks=9, context_length=9)
    assert len({layout(), layout(bytes_per_block=128), layout(block_size=8)}) == 3
