import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.messages import RequestId, WorkerId
from router.index.untold import UntoldBlocks

A, B = WorkerId("a"), WorkerId("b")
ONE, TWO = RequestId("one"), RequestId("two")


def names(*blocks):
    return np.array(blocks, dtype=np.uint64)


def knows(*held):
    return lambda worker, name: (worker, name) in held


@pytest.fixture
def untold():
    untold = UntoldBlocks()
    untold.add(ONE, A, names(1, 2, 3))
    untold.add(TWO, B, names(1, 2, 4, 5))
    return untold


def test_each_worker_will_hold_what_its_deepest_prompt_shares(untold):
    untold.add(RequestId("three"), A, names(1, 7))
    assert untold.match(names(1, 2, 4, 6)) == {A: 2, B: 3}
    assert untold.match(names(1)) == {A: 1, B: 1}
    assert untold.match(names(2, 3)) == {}
    assert untold.match(names()) == {}


def test_a_prompt_without_a_full_block_is_none(untold):
    untold.add(RequestId("short"), A, names())
    assert len(untold) == 2
    untold.computed(RequestId("short"), 0.0)
    untold.drop(RequestId("short"))


def test_one_that_was_not_computed_is_no_longer_expected(untold):
    untold.drop(ONE)
    untold.drop(ONE)
    assert untold.match(names(1, 2)) == {B: 2}


def test_a_computed_one_stays_until_its_own_last_block_is_told_of(untold):
    untold.computed(ONE, 1.0)
    untold.computed(TWO, 1.0)
    untold.told(A, knows((A, 2), (B, 3)))
    assert untold.match(names(1, 2)) == {A: 2, B: 2}
    untold.told(A, knows((A, 3)))
    assert untold.match(names(1, 2)) == {B: 2}
    untold.told(A, knows((A, 3)))


def test_one_still_to_be_computed_is_not_ended_by_what_a_worker_tells(untold):
    untold.told(A, knows((A, 3)))
    untold.forget(A, 1e9)
    assert len(untold) == 2


def test_what_no_worker_tells_of_is_forgotten_after_a_while(untold):
    untold.computed(ONE, 1.0)
    untold.forget(A, 1.5)
    assert len(untold) == 2
    untold.add(RequestId("three"), A, names(8))
    untold.computed(RequestId("three"), 2.5)
    assert untold.match(names(1)) == {B: 1}
    assert untold.match(names(8)) == {A: 1}, "also where no report comes"


def test_all_that_was_sent_to_a_worker_that_is_gone_is_lost(untold):
    untold.add(RequestId("three"), A, names(1, 9))
    untold.computed(ONE, 1.0)
    untold.gone(A)
    assert untold.match(names(1)) == {B: 1}


def test_of_those_that_are_never_told_of_only_some_are_kept(untold):
    for number in range(1000):
        untold.add(RequestId(f"r{number}"), A, names(number + 10))
        untold.computed(RequestId(f"r{number}"), 1.0)
    assert len(untold) == 2 + 64
    assert untold.match(names(10)) == {}
    assert untold.match(names(1009)) == {A: 1}


def test_a_request_that_is_sent_again_counts_where_it_was_sent_last(untold):
    untold.computed(ONE, 1.0)
    untold.add(ONE, B, names(1, 2, 3))
    assert untold.match(names(1, 2, 3)) == {B: 3}
    untold.told(A, knows((A, 3)))
    assert untold.match(names(1, 2, 3)) == {B: 3}


# Prompts of a few texts, each a chain: its names say how it goes on and what is before.
prompts = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(
    lambda lengths: names(*range(1, lengths[0] + 1), *(1000 * lengths[0] + n for n in range(1, lengths[1] + 1)))
)


@given(st.lists(st.tuples(prompts, st.sampled_from([A, B]), st.booleans())), prompts)
def test_depths_are_those_of_comparing_with_each_prompt(sent, prompt):
    untold, expected = UntoldBlocks(), {}
    for number, (blocks, worker, is_dropped) in enumerate(sent):
        untold.add(RequestId(str(number)), worker, blocks)
        if is_dropped:
            untold.drop(RequestId(str(number)))
            continue
        shared = min(len(blocks), len(prompt))
        depth = int(np.count_nonzero(blocks[:shared] == prompt[:shared]))
        if depth:
            expected[worker] = max(depth, expected.get(worker, 0))
    assert untold.match(prompt) == expected
