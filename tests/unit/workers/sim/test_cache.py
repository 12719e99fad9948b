"""The block pool: reference counts, prefix matches, eviction order, and events that tell the truth."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.blocks import unpack
from planes.wire.messages import BlocksRemoved, BlocksStored
from workers.sim.cache import SimCache


class Folded:
    """What somebody who only hears the events believes is held."""

    def __init__(self):
        self.names = set()
        self.batches = []

    def __call__(self, events):
        self.batches.append(events)
        for event in events:
            hashes = set(unpack(event.hashes).tolist())
            if isinstance(event, BlocksStored):
                assert not hashes & self.names
                self.names |= hashes
            else:
                assert isinstance(event, BlocksRemoved)
                assert hashes <= self.names
                self.names -= hashes


def make(num_blocks):
    folded = Folded()
    return SimCache(num_blocks, on_events=folded), folded


def hold(cache, names):
    """A sequence with these names, all computed."""
    matched = cache.match(names, len(names))
    blocks = cache.acquire(names, matched, len(names))
    cache.store(blocks, names)
    return blocks


def test_a_released_prefix_is_found_again_and_shares_its_blocks():
    cache, _ = make(8)
    first = hold(cache, [1, 2, 3])
    cache.release(first)
    assert cache.match([1, 2, 9], 3) == 2
    assert cache.acquire([1, 2, 9], 2, 3)[:2] == first[:2]


def test_a_match_ends_at_the_first_gap_and_at_the_limit():
    cache, _ = make(8)
    cache.release(hold(cache, [1, 2, 3]))
    assert cache.match([9, 2, 3], 3) == 0
    assert cache.match([1, 2, 3], 2) == 2


def test_the_tail_of_the_least_recently_released_sequence_is_evicted_first():
    cache, folded = make(4)
    old = hold(cache, [1, 2])
    new = hold(cache, [3, 4])
    cache.release(old)
    cache.release(new)
    cache.take(3)
    cache.flush()
    assert folded.batches[-1] == [BlocksRemoved(np.array([2, 1, 4], dtype="<u8").tobytes())]
    assert folded.names == {3}


def test_free_blocks_are_used_before_anything_is_evicted():
    cache, folded = make(4)
    cache.release(hold(cache, [1, 2]))
    cache.take(2)
    cache.flush()
    assert folded.names == {1, 2}


def test_touching_a_block_makes_it_young():
    cache, folded = make(2)
    a, b = hold(cache, [1]), hold(cache, [2])
    cache.release(a)
    cache.release(b)
    cache.release(cache.acquire([1], 1, 1))
    cache.take(1)
    cache.flush()
    assert folded.names == {1}


def test_an_acquire_that_does_not_fit_changes_nothing():
    cache, _ = make(4)
    cache.release(hold(cache, [1, 2]))
    before = cache.free_blocks
    assert cache.acquire([1, 2], 2, 5) is None
    assert cache.free_blocks == before
    assert cache.acquire([1, 2], 2, 4) is not None


def test_blocks_matched_while_idle_count_as_taken():
    cache, _ = make(4)
    cache.release(hold(cache, [1, 2]))
    assert cache.acquire([1, 2], 2, 4) is not None
    assert cache.free_blocks == 0


def test_taking_more_than_there_are_is_refused():
    cache, _ = make(2)
    with pytest.raises(IndexError, match="3 more blocks"):
        cache.take(5)


def test_the_same_name_computed_twice_is_held_once():
    cache, folded = make(4)
    first = cache.acquire([7], 0, 1)
    second = cache.acquire([7], 0, 1)
    cache.store(first, [7])
    cache.store(second, [7])
    cache.flush()
    assert folded.names == {7}
    cache.release(second)
    assert cache.free_blocks == 3
    cache.release(first)
    assert cache.free_blocks == 4
    assert cache.cached_names().tolist() == [7]


@given(st.data())
def test_after_any_history_references_balance_and_events_tell_what_is_held(data):
    cache, folded = make(6)
    running = []
    for _ in range(data.draw(st.integers(1, 30))):
        if running and data.draw(st.booleans()):
            cache.release(running.pop(data.draw(st.integers(0, len(running) - 1))))
        else:
            # a tree of prefixes: a name stands for its whole path
            path = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
            names = [int("1" + "".join(map(str, path[: i + 1]))) for i in range(len(path))]
            matched = cache.match(names, len(names))
            blocks = cache.acquire(names, matched, len(names))
            if blocks is not None:
                cache.store(blocks, names)
                running.append(blocks)
        cache.flush()
        references = Counter(block for blocks in running for block in blocks)
        assert cache.free_blocks == 6 - len(references)
        assert folded.names == set(cache.cached_names().tolist())
        assert len(folded.names) <= 6
    for blocks in running:
        cache.release(blocks)
    assert cache.free_blocks == 6
