"""Who is in the next batch."""

import numpy as np
import pytest

from planes.wire.messages import EngineFacts, RequestId
from workers.sim.cache import SimCache
from workers.sim.request import SimLeg, SimRequest
from workers.sim.scheduler import SimScheduler
from workers.sim.sequence import Sequence, State

NO_NAMES = np.array([], dtype=np.uint64)


class World:
    def __init__(self, **changes):
        values = {"num_blocks": 32, "context_length": 64, "max_batch": 4, "max_step_tokens": 16}
        facts = EngineFacts(block_size=4, bytes_per_block=8, vocab_size=320, **(values | changes))
        self.scheduler = SimScheduler(facts, SimCache(facts.num_blocks, on_events=lambda _: None), max_waiting=99)
        self.order = 0

    def add(self, name, prompt_tokens=8, *, is_remote=False, priority=0):
        leg = {"leg": SimLeg.DECODE, "remote_tokens": prompt_tokens} if is_remote else {}
        request = SimRequest(RequestId(name), prompt_tokens, NO_NAMES, max_tokens=9, priority=priority, **leg)
        self.order += 1
        sequence = Sequence(request, self.order, left=9, key=0, now=0.0)
        self.scheduler.add(sequence)
        return sequence

    def arrived(self, name):
        """A decode leg whose KV cache is here."""
        sequence = self.add(name, is_remote=True)
        assert self.scheduler.admit_remote().remote == [sequence]
        sequence.computed = sequence.length - 1
        self.scheduler.arrive(sequence)
        return sequence

    def step(self):
        """Names in the next batch, with their tokens; then they are computed."""
        batch = self.scheduler.schedule()
        for sequence, tokens in batch.chunks:
            sequence.computed += tokens
            if sequence.computed == sequence.length:
                sequence.length += 1
                self.scheduler.decode(sequence)
        return [(sequence.request.request, tokens) for sequence, tokens in batch.chunks]


@pytest.mark.parametrize("limits", [{"max_batch": 1}, {"max_step_tokens": 1, "max_batch": 1}])
def test_an_arrived_kv_cache_goes_before_whoever_waits_whatever_their_priority(limits):
    world = World(**limits)
    decode = world.arrived("decode")
    world.add("waiting", priority=-5)
    assert world.step() == [("decode", 1)]
    assert decode.state is State.RUNNING


def test_arrived_kv_caches_come_first_and_in_the_order_of_their_arrival():
    world = World()
    second, first = world.arrived("a"), world.arrived("b")
    world.scheduler._arrived.clear()
    for sequence in (first, second):
        world.scheduler.arrive(sequence)
    world.add("waiting", 4)
    assert world.step() == [("b", 1), ("a", 1), ("waiting", 4)]


def test_a_step_has_decodes_then_begun_prompts_then_new_ones():
    world = World(max_step_tokens=10)
    world.add("decoding", 4)
    assert world.step() == [("decoding", 4)]
    world.add("long", 24)
    assert world.step() == [("long", 9)]  # the one that decodes has a token of the step
    world.add("new", 4)
    assert world.step() == [("long", 9)]
    assert world.step() == [("long", 6), ("new", 3)]


def test_nobody_is_admitted_in_a_step_that_preempts():
    world = World(num_blocks=5, context_length=16, max_step_tokens=16)
    world.add("first", 8)
    world.add("second", 8)
    assert world.step() == [("first", 8), ("second", 8)]
    world.add("third", 4)
    for sequence in world.scheduler.decoding:
        sequence.computed = sequence.capacity  # both need a block, and there is one
    batch = world.scheduler.schedule()
    assert batch.has_preempted
    assert batch.chunks == []
    assert [sequence.request.request for sequence in world.scheduler.decoding] == ["first"]


def shortest_first(**changes):
    return World(**({"max_step_tokens": 10, "is_shortest_first": True, "context_length": 128} | changes))


def test_in_turn_a_short_prompt_waits_for_a_long_one():
    world = World(max_step_tokens=10, context_length=128)
    world.add("long", 30)
    assert world.step() == [("long", 10)]
    world.add("short", 4)
    assert world.step() == [("long", 10)]
    assert world.step() == [("long", 10)]


def test_a_shorter_prompt_passes_those_that_have_begun_and_has_the_step_to_itself():
    world = shortest_first()
    world.add("long", 30)
    assert world.step() == [("long", 10)]
    world.add("short", 4)
    assert world.step() == [("short", 4)]
    assert world.step() == [("long", 9)]  # the short one decodes


def test_nobody_is_passed_in_two_steps_in_a_row():
    world = shortest_first()
    world.add("long", 60)
    world.step()
    world.add("short", 12)
    assert world.step() == [("short", 10)]
    world.add("shorter", 1)
    assert world.step() == [("short", 2), ("long", 3), ("shorter", 1)]  # 10 // 3 for each


def test_of_prompts_that_have_begun_the_one_with_least_left_is_first():
    world = shortest_first(max_step_tokens=24)
    world.add("long", 40)
    world.add("middle", 30)
    assert world.step() == [("long", 24)]
    assert world.step() == [("long", 16), ("middle", 8)]
    world = shortest_first()
    world.add("long", 60)
    world.step()
    world.add("middle", 20)
    assert world.step() == [("middle", 10)]
    assert world.step() == [("middle", 10)]  # though it came later
    assert world.step() == [("long", 9)]


def test_a_longer_prompt_does_not_pass():
    world = shortest_first()
    world.add("long", 30)
    world.step()
    world.add("longer", 40)
    assert world.step() == [("long", 10)]


def test_without_a_seat_for_all_prompts_share_the_step():
    world = shortest_first(max_batch=2)
    world.add("long", 60)
    world.step()
    world.add("short", 8)
    world.add("other", 8)
    assert world.step() == [("long", 5), ("short", 5)]


def test_an_arrived_kv_cache_has_a_step_next_to_without_prompts():
    world = shortest_first()
    world.add("long", 60)
    world.step()
    world.arrived("decode")
    assert world.step() == [("long", 1), ("decode", 1)]
    world.arrived("another")
    assert world.step() == [("long", 4), ("another", 1)]  # not in two steps in a row: 9 // 2
    assert world.step() == [("long", 8)]
