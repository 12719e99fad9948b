"""The simulated engine's core: scheduling, tokens, handovers, runs of steps, and that nothing leaks."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from planes.wire.blocks import name_blocks, root, unpack
from planes.wire.errors import Rejected
from planes.wire.frames import FinishReason
from planes.wire.messages import BlocksStored, EngineFacts, LatencyPrior, RequestId
from workers.sim.core import EngineQueueFull, SimCore, SimLeg, SimRequest
from workers.sim.tokens import EOS, advance_all, draw, key_of

SIZE = 4
MODEL = "m"
SPEED = LatencyPrior(
    prefill_fixed_s=0.25,
    prefill_per_token_s=1 / 64,
    prefill_per_pair_s=1 / 4096,
    step_fixed_s=0.125,
    step_per_sequence_s=1 / 128,
    step_per_kv_token_s=1 / 1024,
)
"""Powers of two, so that sums of seconds are exact."""


def facts(**changes):
    values = {
        "block_size": SIZE,
        "num_blocks": 32,
        "context_length": 64,
        "max_batch": 4,
        "max_step_tokens": 16,
        "bytes_per_block": 64,
        "vocab_size": 320,
    }
    return EngineFacts(**(values | changes))


class Memory:
    """KV bytes without an engine around them."""

    def __init__(self, num_blocks=32):
        self.words = np.zeros(num_blocks, dtype=np.uint64)

    def write(self, blocks, words):
        self.words[blocks] = words

    def read(self, blocks):
        return self.words[blocks]


class Harness:
    """A core, what its events say, and what came out of it."""

    def __init__(self, memory=None, **changes):
        max_waiting = changes.pop("max_waiting", 1000)
        self.facts = facts(**changes)
        self.held = set()
        self.core = SimCore(self.facts, SPEED, model=MODEL, on_events=self.fold, memory=memory, max_waiting=max_waiting)
        self.now = 0.0
        self.tokens = {}
        self.times = {}
        self.reports = {}
        self.finish = {}

    def fold(self, events):
        for event in events:
            names = set(unpack(event.hashes).tolist())
            self.held = self.held | names if isinstance(event, BlocksStored) else self.held - names

    def submit(self, name, prompt, max_tokens=3, *, resume=(), has_tokens=True, **more):
        tokens = np.array([*prompt, *resume], dtype=np.uint32)
        start = root(MODEL)
        self.core.submit(
            SimRequest(
                RequestId(name),
                len(prompt),
                name_blocks(tokens, SIZE, start),
                max_tokens,
                resume_tokens=len(resume),
                tokens=tokens if has_tokens else None,
                root=start,
                **more,
            ),
            now=self.now,
        )

    def step(self, horizon=None):
        """One step or run; False if idle."""
        if self.core.begin_step(now=self.now, horizon=horizon) is None:
            return False
        self.end()
        return True

    def end(self):
        self.now = self.core.busy_until
        for output in self.core.end_step(now=self.now):
            assert output.request not in self.finish
            self.tokens.setdefault(output.request, []).extend(output.tokens)
            self.times.setdefault(output.request, []).extend(self.core.step_ends[-output.num_tokens :])
            if output.finish is not None:
                self.finish[output.request] = output.finish
                self.reports[output.request] = output.report

    def drain(self, horizon=None):
        while self.step(horizon):
            pass

    def assert_empty(self):
        load = self.core.load()
        assert (load.num_running, load.num_waiting, load.waiting_prefill_tokens, load.kv_tokens) == (0, 0, 0, 0)
        assert load.free_blocks == self.facts.num_blocks
        assert self.held == set(self.core.cached_names().tolist())


def expected(prompt, count, key=0):
    """The token function, written down once more: from the whole context, every time."""
    context = list(prompt)
    for _ in range(count):
        names = name_blocks(np.array(context, dtype=np.uint32), SIZE, root(MODEL))
        full = len(context) // SIZE
        state = advance_all(int(names[-1]) if full else root(MODEL), context[full * SIZE :])
        context += draw(state, key ^ key_of(MODEL, 0))[1]
    return context[len(prompt) :]


prompt_a = list(range(97, 97 + 10))


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_tokens_are_a_function_of_the_whole_context(length):
    h = Harness()
    h.submit("r", prompt_a[:length], 14)
    h.drain()
    assert h.tokens["r"] == expected(prompt_a[:length], 14)
    assert all(token == 32 or 97 <= token <= 122 for token in h.tokens["r"])
    h.assert_empty()


def test_changing_any_prompt_token_changes_what_follows():
    answers = set()
    for position in range(10):
        h = Harness()
        changed = list(prompt_a)
        changed[position] += 1
        h.submit("r", changed, 12)
        h.drain()
        answers.add(tuple(h.tokens["r"]))
    assert len(answers) == 10


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_resumed_stream_goes_on_exactly_where_it_was(cut):
    whole = expected(prompt_a, 9)
    h = Harness()
    h.submit("r", prompt_a, 9, resume=whole[:cut])
    h.drain()
    assert whole[:cut] + h.tokens["r"] == whole
    assert h.finish["r"] is FinishReason.LENGTH


def test_keys_pick_different_streams_of_one_prompt():
    h = Harness()
    for key in range(3):
        h.submit(f"r{key}", prompt_a, 12, key=key_of(None, key))
    h.drain()
    assert len({tuple(tokens) for tokens in h.tokens.values()}) == 3


def test_a_stop_token_ends_the_answer_and_is_reported():
    whole = expected(prompt_a, 20)
    stop = whole[5]
    first = whole.index(stop)
    h = Harness()
    h.submit("r", prompt_a, 20, stop_tokens=frozenset([stop]))
    h.drain()
    assert h.tokens["r"] == whole[: first + 1]
    assert h.finish["r"] is FinishReason.STOP
    h.assert_empty()


def test_no_stop_token_ends_the_answer_before_min_tokens():
    whole = expected(prompt_a, 20)
    h = Harness()
    h.submit("r", prompt_a, 20, stop_tokens=frozenset(range(320)), min_tokens=7)
    h.drain()
    assert h.tokens["r"] == whole[:7]


def test_a_natural_end_is_an_end_of_text_token_and_the_same_after_a_migration():
    h = Harness()
    h.submit("r", prompt_a, 50, natural_tokens=8)
    h.drain()
    whole = h.tokens["r"]
    assert whole[-1] == EOS
    assert h.finish["r"] is FinishReason.STOP
    h.submit("again", prompt_a, 50, natural_tokens=8, resume=whole[:2])
    h.drain()
    assert whole[:2] + h.tokens["again"] == whole


def test_the_context_length_ends_an_answer():
    h = Harness()
    h.submit("r", prompt_a, 1000)
    h.drain()
    assert len(h.tokens["r"]) == 64 - 10
    assert h.finish["r"] is FinishReason.LENGTH


def test_a_prompt_for_a_vector_takes_the_whole_context_and_all_blocks():
    h = Harness(num_blocks=64 // SIZE, embedding_size=8)
    h.submit("r", [97] * 64, 1)
    h.drain()
    assert (len(h.tokens["r"]), h.finish["r"]) == (1, FinishReason.LENGTH)
    with pytest.raises(ValueError, match=r"65 tokens.*1 to 64"):
        h.submit("s", [97] * 65, 1)
    h.assert_empty()


# --- scheduling ------------------------------------------------------------------------------------------------


def test_a_step_costs_what_the_speed_says():
    h = Harness()
    h.submit("r", prompt_a, 3)
    assert h.core.begin_step(now=0.0) == 0.25 + 10 / 64 + 55 / 4096
    h.end()
    assert h.core.last_sample.prefill_tokens == 10
    assert h.core.last_sample.prefill_pairs == 55
    assert h.core.begin_step(now=h.now) == 0.125 + 1 / 128 + 11 / 1024
    h.end()
    assert h.core.last_sample.batch == 1
    assert h.core.last_sample.kv_tokens == 11
    assert len(h.core.take_samples()) == 2
    assert h.core.take_samples() == []


def test_a_slowdown_counts_from_the_next_step_on():
    h = Harness()
    h.submit("r", prompt_a, 3)
    h.core.begin_step(now=0.0)
    h.core.set_slowdown(2.0, now=0.0)
    assert h.core.busy_until == 0.25 + 10 / 64 + 55 / 4096
    h.end()
    assert h.core.begin_step(now=h.now) == 2 * (0.125 + 1 / 128 + 11 / 1024)


def test_long_prompts_are_computed_in_chunks_beside_the_decodes():
    h = Harness()
    h.submit("short", prompt_a[:4], 9)
    h.step()
    h.submit("long", list(range(100, 140)), 2)
    tokens = []
    while "long" not in h.tokens:
        h.step()
        tokens.append((h.core.last_sample.batch, h.core.last_sample.prefill_tokens))
    assert tokens == [(1, 15), (1, 15), (1, 10)]
    assert len(h.tokens["short"]) == 4


def test_waiting_requests_run_by_priority_then_arrival():
    h = Harness(max_batch=1)
    for name, priority in (("first", 0), ("late", 1), ("second", 0), ("urgent", -1)):
        h.submit(name, prompt_a, 1, priority=priority)
    h.drain()
    assert sorted(h.times, key=lambda name: h.times[name][0]) == ["urgent", "first", "second", "late"]


def test_no_more_than_max_batch_run():
    h = Harness(max_batch=2)
    for i in range(5):
        h.submit(f"r{i}", prompt_a, 4)
    while h.step():
        assert h.core.load().num_running <= 2
    assert len(h.finish) == 5


def test_a_prompt_seen_before_is_cached_but_for_its_last_token():
    h = Harness()
    prompt = list(range(97, 97 + 8))
    h.submit("a", prompt, 1)
    h.drain()
    h.submit("b", prompt, 1)
    h.submit("c", [*prompt, 1], 1)
    h.drain()
    assert h.reports["a"].cached_tokens == 0
    assert h.reports["b"].cached_tokens == 4
    assert h.reports["c"].cached_tokens == 8
    h.assert_empty()


@pytest.mark.parametrize("is_aborted", [False, True])
def test_prompts_of_one_step_compute_what_they_share_once(is_aborted):
    h = Harness(memory=Memory(), max_step_tokens=16)
    shared = list(range(97, 97 + 8))
    h.submit("a", [*shared, 1], 1)
    h.submit("b", [*shared, 2, 3], 1)
    h.core.begin_step(now=h.now)
    if is_aborted:
        h.core.abort(RequestId("a"), now=h.now)
    h.end()
    assert h.reports["b"].cached_tokens == 8
    assert h.tokens["b"] == expected([*shared, 2, 3], 1)
    assert h.core.last_sample.prefill_tokens == 9 + 2
    assert (RequestId("a") in h.finish) is not is_aborted
    h.assert_empty()


def test_a_chunk_is_shared_as_far_as_it_goes():
    h = Harness(max_step_tokens=8)
    prompt = list(range(97, 97 + 11))
    h.submit("a", prompt, 1)
    h.submit("b", prompt[:7], 1)
    h.drain()
    assert (h.reports["a"].cached_tokens, h.reports["b"].cached_tokens) == (0, 4)
    assert h.times["a"] == h.times["b"]  # 8 tokens, then 3 and 3
    h.assert_empty()


def test_generated_blocks_are_cached_under_the_names_a_next_turn_asks_for():
    h = Harness()
    h.submit("a", prompt_a, 8)
    h.drain()
    h.submit("b", [*prompt_a, *h.tokens["a"]], 1)
    h.drain()
    assert h.reports["b"].cached_tokens == 16


def test_another_model_or_salt_shares_nothing():
    h = Harness()
    h.submit("a", prompt_a, 1)
    h.drain()
    other = root(MODEL, "salt")
    tokens = np.array(prompt_a, dtype=np.uint32)
    names = name_blocks(tokens, SIZE, other)
    h.core.submit(SimRequest(RequestId("b"), 10, names, 1, tokens=tokens, root=other), now=h.now)
    h.drain()
    assert h.reports["b"].cached_tokens == 0
    assert h.tokens["a"] != h.tokens["b"] or expected(prompt_a, 1) == h.tokens["b"]


def test_preempted_requests_give_the_same_tokens():
    h = Harness(num_blocks=16)
    prompts = {f"r{i}": [97 + i, *prompt_a] for i in range(4)}
    for name, prompt in prompts.items():
        h.submit(name, prompt, 20)
    h.drain()
    assert sum(report.num_preemptions for report in h.reports.values()) > 0
    for name, prompt in prompts.items():
        assert h.tokens[name] == expected(prompt, 20)
    h.assert_empty()


def test_the_oldest_request_is_never_preempted_for_younger_ones():
    h = Harness(num_blocks=16)
    for i in range(4):
        h.submit(f"r{i}", [97 + i, *prompt_a], 20)
    h.drain()
    assert h.reports["r0"].num_preemptions == 0
    assert h.times["r0"][-1] == min(times[-1] for times in h.times.values())


def test_reported_seconds_add_up_to_what_passed():
    h = Harness(max_batch=1)
    h.submit("a", prompt_a, 4)
    h.submit("b", prompt_a[::-1], 4)
    h.drain()
    report = h.reports["b"]
    assert report.queue_s == h.times["a"][-1]
    assert report.queue_s + report.prefill_s == h.times["b"][0]
    assert report.decode_s == h.times["b"][-1] - h.times["b"][0]


# --- handover --------------------------------------------------------------------------------------------------


def hand_over(prompt, *, max_tokens=9, resume=(), remote_tokens=None, spoil=None, warm=0):
    """Prefill in one engine, decode in another; returns the decode side."""
    size = -(-len(prompt) // SIZE)
    prefill, decode = Harness(memory=Memory()), Harness(memory=Memory())
    if warm:
        decode.submit("warm", prompt[:warm], 1)
        decode.drain()
    prefill.submit("r", prompt, 9, leg=SimLeg.PREFILL)
    prefill.drain()
    assert prefill.finish["r"] is FinishReason.LENGTH
    theirs = prefill.core.blocks_of(RequestId("r"))
    decode.submit("r", prompt, max_tokens, resume=resume, leg=SimLeg.DECODE, remote_tokens=remote_tokens or len(prompt))
    assert decode.core.take_admitted() == ["r"]
    assert not decode.step()
    missing = decode.core.missing_blocks(RequestId("r"))
    ours = decode.core.blocks_of(RequestId("r"))[size - missing : size]
    words = prefill.core._memory.read(theirs[size - missing :])
    if spoil is not None:
        words[spoil] ^= np.uint64(1)
    decode.core._memory.write(ours, words)
    decode.now = 5.0
    decode.core.handover_arrived(RequestId("r"), now=5.0)
    decode.drain()
    prefill.core.release_lease(RequestId("r"), now=9.0)
    prefill.assert_empty()
    decode.assert_empty()
    return prefill, decode


@pytest.mark.parametrize("length", [1, 4, 7, 8, 10])
def test_a_handed_over_prompt_goes_on_as_it_would_have_at_home(length):
    prefill, decode = hand_over(prompt_a[:length])
    assert decode.tokens["r"] == expected(prompt_a[:length], 9)
    assert prefill.tokens["r"] == decode.tokens["r"][:1]
    assert decode.reports["r"].handover_s == 5.0
    assert decode.reports["r"].handover_blocks == -(-length // SIZE)
    assert decode.reports["r"].prefill_s == 0.0


@pytest.mark.parametrize("length", [1, 4, 7, 8, 10])
def test_the_first_token_may_come_along_with_the_handover(length):
    first = expected(prompt_a[:length], 1)
    _, decode = hand_over(prompt_a[:length], resume=first, remote_tokens=length)
    assert first + decode.tokens["r"] == expected(prompt_a[:length], 9)


@pytest.mark.parametrize("spoil", [0, 1, 2])
def test_wrong_kv_bytes_give_wrong_tokens(spoil):
    _, decode = hand_over(prompt_a, spoil=spoil)
    assert decode.tokens["r"] != expected(prompt_a, 9)


def test_only_blocks_that_are_not_cached_are_missing():
    _, decode = hand_over(prompt_a, warm=9)
    assert decode.reports["r"].handover_blocks == 1
    assert decode.reports["r"].cached_tokens == 8
    assert decode.tokens["r"] == expected(prompt_a, 9)


def test_blocks_that_were_handed_over_are_cached_and_published():
    _, decode = hand_over(prompt_a)
    decode.submit("next", [*prompt_a, 1, 2], 1)
    decode.drain()
    assert decode.reports["next"].cached_tokens >= 8


def test_a_lease_pins_its_blocks_until_it_is_released():
    h = Harness(num_blocks=16)
    h.submit("r", prompt_a, 9, leg=SimLeg.PREFILL)
    h.drain()
    assert h.core.num_leases == 1
    assert h.core.load().free_blocks == 13
    with pytest.raises(ValueError, match="in use"):
        h.submit("r", prompt_a)
    h.core.release_lease(RequestId("r"), now=1.0)
    h.core.release_lease(RequestId("r"), now=1.0)
    h.assert_empty()


def test_a_prefill_leg_that_its_first_token_ends_leaves_no_lease():
    h = Harness()
    h.submit("r", prompt_a, 9, leg=SimLeg.PREFILL, stop_tokens=frozenset(expected(prompt_a, 1)))
    h.drain()
    assert h.finish["r"] is FinishReason.STOP
    h.assert_empty()


def test_a_decode_leg_that_does_not_fit_waits_for_its_blocks():
    h = Harness(num_blocks=16)
    h.submit("big", list(range(100, 160)), 3)
    h.step()
    h.submit("r", prompt_a, 3, leg=SimLeg.DECODE, remote_tokens=10)
    assert h.core.take_admitted() == []
    assert h.core.missing_blocks(RequestId("r")) == 3
    while h.step():
        pass
    assert h.finish["big"] is FinishReason.LENGTH
    assert h.core.take_admitted() == ["r"]
    h.core.abort(RequestId("r"), now=h.now)
    h.drain()
    h.assert_empty()


# --- refusals --------------------------------------------------------------------------------------------------


def test_what_can_never_run_is_refused_with_value_and_limit():
    h = Harness()
    with pytest.raises(ValueError, match=r"64 tokens.*1 to 63"):
        h.submit("r", [97] * 64)
    with pytest.raises(ValueError, match="max_tokens is 2; 2"):
        h.submit("r", prompt_a, 2, resume=[97, 97])
    with pytest.raises(ValueError, match="11 tokens of KV cache"):
        h.submit("r", prompt_a, leg=SimLeg.DECODE, remote_tokens=11)
    with pytest.raises(ValueError, match="block names"):
        h.core.submit(SimRequest(RequestId("r"), 4, np.zeros(2, dtype=np.uint64), 1), now=0.0)
    h.assert_empty()


def test_a_full_queue_is_refused_and_holds_nothing_of_the_request():
    h = Harness(max_waiting=1)
    h.submit("a", prompt_a)
    with pytest.raises(EngineQueueFull, match="1 requests are waiting at this worker and the limit is 1") as caught:
        h.submit("b", prompt_a)
    assert isinstance(caught.value, Rejected)
    h.drain()
    h.submit("b", prompt_a)
    h.drain()
    h.assert_empty()


@pytest.mark.parametrize("changes", [{"num_blocks": 15}, {"max_step_tokens": 3}])
def test_facts_that_make_no_engine_are_refused(changes):
    with pytest.raises(ValueError, match=r"blocks of 4 tokens|less than max_batch"):
        Harness(**changes)


def test_stepping_out_of_order_is_a_bug():
    h = Harness()
    with pytest.raises(RuntimeError, match="no step"):
        h.core.end_step(now=0.0)
    h.submit("r", prompt_a)
    h.core.begin_step(now=0.0)
    with pytest.raises(RuntimeError, match="in progress"):
        h.core.begin_step(now=0.0)


# --- runs of steps ---------------------------------------------------------------------------------------------


@st.composite
def workloads(draw_):
    """(arrival instant, name, prompt, completion tokens) of requests, and (instant, request) of aborts."""
    requests = []
    for i in range(draw_(st.integers(1, 10))):
        prompt = draw_(st.lists(st.integers(0, 1), min_size=1, max_size=30))
        requests.append((draw_(st.integers(0, 400)) / 64, f"r{i}", prompt, draw_(st.integers(1, 33))))
    aborts = draw_(st.lists(st.tuples(st.integers(0, 600).map(lambda n: n / 64), st.integers(0, 9)), max_size=3))
    return sorted(requests), sorted(aborts)


def simulate(workload, horizon, *, is_shortest_first):
    """A discrete-event loop as the simulator's: arrivals and aborts cut what is in progress."""
    requests, aborts = workload
    h = Harness(num_blocks=16, max_batch=3, is_shortest_first=is_shortest_first)
    events: list[tuple[float, int, Any]] = [(at, 0, (name, prompt, count)) for at, name, prompt, count in requests]
    events += [(at, 1, f"r{i}") for at, i in aborts]
    loads = []
    for at, kind, what in [*sorted(events, key=lambda e: e[:2]), (math.inf, 2, None)]:
        while True:
            if h.core.busy_until is None and h.core.begin_step(now=h.now, horizon=horizon) is None:
                break
            if h.core.busy_until > at:
                break
            h.end()
        if kind == 2:
            break
        loads.append(h.core.load(now=at))
        if h.core.busy_until is None:
            h.now = at
        clock, h.now = h.now, at
        if kind == 0:
            h.submit(what[0], what[1], what[2], has_tokens=False)
        else:
            h.core.abort(RequestId(what), now=at)
        h.now = clock
    h.assert_empty()
    return h, loads


@settings(max_examples=200, deadline=None)
@given(workloads(), st.booleans())
def test_runs_of_steps_give_exactly_what_single_steps_give(workload, is_shortest_first):
    single, single_loads = simulate(workload, None, is_shortest_first=is_shortest_first)
    runs, run_loads = simulate(workload, math.inf, is_shortest_first=is_shortest_first)
    aborted = {f"r{i}" for _, i in workload[1]}  # a run in progress drops what it gave a request aborted meanwhile
    assert {n: t for n, t in runs.times.items() if n not in aborted} == {
        n: t for n, t in single.times.items() if n not in aborted
    }
    assert runs.finish == single.finish
    assert runs.reports == single.reports
    assert runs.held == single.held
    assert run_loads == single_loads


def test_a_run_is_one_call_for_many_steps():
    h = Harness()
    h.submit("r", prompt_a, 40, has_tokens=False)
    h.step(math.inf)
    h.step(math.inf)
    assert len(h.core.step_ends) == 39
    assert len(h.core.take_samples()) == 40
    assert not h.step(math.inf)


def test_a_run_ends_with_the_step_that_begins_before_the_horizon():
    h = Harness()
    h.submit("r", prompt_a, 40, has_tokens=False)
    h.step()
    begun = h.now
    h.core.begin_step(now=begun, horizon=begun + 0.5)
    h.end()
    starts = [begun, *h.core.step_ends[:-1]]
    assert starts[-1] < begun + 0.5 <= h.core.step_ends[-1]


# --- everything at once ----------------------------------------------------------------------------------------


class Story(RuleBasedStateMachine):
    """Any order of calls. Holds after each: counts are right. At the end: everybody ended once, nothing leaked."""

    is_shortest_first = False

    def __init__(self):
        super().__init__()
        self.h = Harness(num_blocks=16, max_batch=3, max_step_tokens=8, is_shortest_first=self.is_shortest_first)
        self.prompts, self.remote, self.aborted, self.prefills = {}, set(), set(), set()

    @rule(
        prompt=st.lists(st.sampled_from([97, 98]), min_size=1, max_size=24),
        leg=st.sampled_from(list(SimLeg)),
        count=st.integers(1, 12),
        priority=st.integers(0, 1),
        share=st.floats(0, 1),
    )
    def submit(self, prompt, leg, count, priority, share):
        name = f"r{len(self.prompts)}"
        self.prompts[name] = (prompt, 1 if leg is SimLeg.PREFILL else count)
        if leg is SimLeg.PREFILL:
            self.prefills.add(name)
        remote_tokens = max(1, int(share * len(prompt))) if leg is SimLeg.DECODE else 0
        self.h.submit(name, prompt, count, leg=leg, remote_tokens=remote_tokens, priority=priority)

    @rule()
    def arrive(self):
        self.remote.update(self.h.core.take_admitted())
        if self.remote:
            self.h.core.handover_arrived(RequestId(self.remote.pop()), now=self.h.now)

    @rule(number=st.integers(0, 30))
    def abort(self, number):
        name = f"r{number}"
        self.h.core.abort(RequestId(name), now=self.h.now)
        self.remote.discard(name)
        if name in self.prompts and name not in self.h.finish:
            self.aborted.add(name)

    @rule(number=st.integers(0, 30))
    def release(self, number):
        self.h.core.release_lease(RequestId(f"r{number}"), now=self.h.now)

    @precondition(lambda self: self.h.core.busy_until is None)
    @rule()
    def begin(self):
        self.h.core.begin_step(now=self.h.now)

    @precondition(lambda self: self.h.core.busy_until is not None)
    @rule()
    def end(self):
        self.h.end()

    @invariant()
    def counts_are_right(self):
        load, scheduler = self.h.core.load(), self.h.core._scheduler
        assert 0 <= load.free_blocks <= 16
        assert load.num_running <= 3
        decoding = sum(sequence.length for sequence in scheduler.decoding)
        assert load.kv_tokens == decoding + sum(sequence.computed for sequence in scheduler.prefilling)
        cache, names = self.h.core._cache, set(self.h.core.cached_names().tolist())
        assert self.h.held == (names - set(cache._stored)) | set(cache._removed)
        if self.h.core.busy_until is None:  # a step tells at its end, at the latest, what it fills
            assert self.h.held == names

    def teardown(self):
        if self.h.core.busy_until is not None:
            self.h.end()
        while True:
            self.arrive()
            for name in self.prefills:
                self.h.core.release_lease(RequestId(name), now=self.h.now)
            is_stepping = self.h.step()
            load = self.h.core.load()
            if not load.num_running + load.num_waiting + self.h.core.num_leases:
                break
            self.remote.update(self.h.core.take_admitted())  # by the step that found nothing else to do
            assert is_stepping or self.remote or self.h.core.num_leases
        assert set(self.h.finish) | self.aborted == set(self.prompts)
        assert not set(self.h.finish) & self.aborted
        for name in self.h.finish:
            prompt, count = self.prompts[name]
            assert self.h.tokens[name] == expected(prompt, count)
            assert all(a < b for a, b in pairwise(self.h.times[name]))
        self.h.assert_empty()


class ShortestFirstStory(Story):
    is_shortest_first = True


TestStory = Story.TestCase
TestShortestFirstStory = ShortestFirstStory.TestCase
TestStory.settings = TestShortestFirstStory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
