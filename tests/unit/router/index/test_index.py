import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from planes.wire.blocks import digest, pack, unpack
from planes.wire.messages import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    KvEvents,
    LoadReport,
    Snapshot,
    WorkerId,
    WorkerState,
)
from router.index.block_masks import BlockMasks
from router.index.block_table import BlockTable, NotCompiledError, load
from router.index.index import BlockIndex, fastest_blocks

A, B = WorkerId("a"), WorkerId("b")


def hashes(*names):
    return np.array(names, dtype=np.uint64)


def stored(worker, seq, *names, epoch=1):
    return KvEvents(worker, epoch, seq, [BlocksStored(pack(hashes(*names)))])


def removed(worker, seq, *names, epoch=1):
    return KvEvents(worker, epoch, seq, [BlocksRemoved(pack(hashes(*names)))])


def report(worker, seq, names, epoch=1):
    held = hashes(*names)
    return LoadReport(worker, epoch, WorkerState.READY, 0, 0, 0, 0, 0, seq, len(held), digest(held))


def compiled():
    try:
        return BlockTable(load())
    except NotCompiledError as exc:
        pytest.skip(str(exc))


@pytest.fixture(params=[BlockMasks, compiled])
def index_of(request):
    def make(*workers, limit=1000):
        index = BlockIndex(request.param())
        for worker in workers:
            index.add(worker, 1, limit)
        return index

    return make


def test_matches_leading_blocks_without_a_hole(index_of):
    index = index_of(A, B)
    index.apply(stored(A, 1, 1, 2, 3, 4))
    index.apply(stored(B, 1, 1, 3, 4))
    assert index.match(hashes(1, 2, 3, 9)) == {A: 3, B: 1}
    assert index.match(hashes(9, 1)) == {}
    assert index.match(hashes()) == {}


def test_matches_prompts_longer_than_one_look_up(index_of):
    index = index_of(A, B)
    names = np.arange(1, 1001, dtype=np.uint64)
    index.apply(KvEvents(A, 1, 1, [BlocksStored(pack(names))]))
    index.apply(KvEvents(B, 1, 1, [BlocksStored(pack(names[:600]))]))
    assert index.match(names) == {A: 1000, B: 600}


def test_a_prompt_that_is_asked_about_again_sees_what_has_changed(index_of):
    index, names = index_of(A, B), hashes(1, 2, 3)
    changes = [
        (lambda: index.apply(stored(A, 1, 1, 2, 3)), {A: 3}),
        (lambda: index.apply(removed(A, 2, 3)), {A: 2}),
        (lambda: index.apply_snapshot(Snapshot(B, 2, 5, pack(hashes(1)))), {A: 2, B: 1}),
        (lambda: index.check(report(B, 1, [], epoch=3)), {A: 2}),
        (lambda: index.apply(KvEvents(A, 1, 3, [AllCleared()])), {}),
        (lambda: index.apply(stored(A, 4, 1)), {A: 1}),
        (lambda: index.drop(A), {}),
    ]
    assert index.match(names) == {}
    for change, found in changes:
        change()
        assert index.match(names) == found


def test_storing_a_held_block_and_a_block_twice_changes_nothing(index_of):
    index = index_of(A)
    index.apply(stored(A, 1, 1, 2, 2))
    index.apply(stored(A, 2, 2, 1))
    assert index.num_cached(A) == 2
    index.check(report(A, 2, [1, 2]))
    assert index.is_exact(A)


def test_removing_a_block_that_is_not_held_changes_nothing(index_of):
    index = index_of(A, B)
    index.apply(stored(B, 1, 7))
    index.apply(removed(A, 1, 7, 8))
    assert index.match(hashes(7)) == {B: 1}
    assert index.num_cached(A) == 0


def test_a_duplicate_is_ignored(index_of):
    index = index_of(A)
    index.apply(stored(A, 1, 1))
    index.apply(removed(A, 2, 1))
    index.apply(stored(A, 1, 1))
    assert index.match(hashes(1)) == {}
    assert index.is_exact(A)


def test_a_gap_asks_for_a_snapshot_and_goes_on_applying(index_of):
    index = index_of(A)
    index.apply(stored(A, 1, 1))
    index.apply(stored(A, 3, 2))
    assert index.inexact() == [A]
    assert index.match(hashes(1, 2)) == {A: 2}


def test_events_after_the_snapshot_are_applied_on_top_of_it(index_of):
    index = index_of(A)
    index.apply(stored(A, 2, 2))
    index.apply(removed(A, 3, 1))
    index.apply(stored(A, 4, 4))
    index.apply_snapshot(Snapshot(A, 1, 2, pack(hashes(1, 2))))
    assert sorted(index.held(A).tolist()) == [2, 4]
    assert index.is_exact(A)


def test_a_snapshot_older_than_the_kept_events_asks_for_another(index_of):
    index = index_of(A)
    index.apply(stored(A, 5, 5))
    index.apply_snapshot(Snapshot(A, 1, 3, pack(hashes(1))))
    assert index.inexact() == [A]
    index.apply_snapshot(Snapshot(A, 1, 5, pack(hashes(1, 5))))
    assert index.inexact() == []


def test_a_late_snapshot_does_not_turn_back_an_exact_copy(index_of):
    index = index_of(A)
    index.apply(stored(A, 1, 1))
    index.apply(stored(A, 2, 2))
    index.apply_snapshot(Snapshot(A, 1, 1, pack(hashes(1))))
    assert index.match(hashes(1, 2)) == {A: 2}


def test_a_newer_epoch_forgets_the_blocks_and_an_older_one_is_ignored(index_of):
    index = index_of(A)
    index.apply(stored(A, 1, 1))
    index.apply(stored(A, 1, 2, epoch=5))
    index.apply(stored(A, 2, 3, epoch=1))
    assert index.held(A).tolist() == [2]
    index.apply_snapshot(Snapshot(A, 1, 9, pack(hashes(1))))
    assert index.held(A).tolist() == [2]
    assert index.is_exact(A)


@pytest.mark.parametrize("names", [[1], [1, 2, 3], [1, 4]])
def test_a_report_that_disagrees_asks_for_a_snapshot(index_of, names):
    index = index_of(A)
    index.apply(stored(A, 1, 1, 2))
    index.check(report(A, 1, names))
    assert index.inexact() == [A]


def test_a_lost_tail_is_noticed_with_the_second_report(index_of):
    index = index_of(A)
    index.apply(stored(A, 1, 1))
    index.check(report(A, 2, [1, 2]))
    assert index.is_exact(A)
    index.check(report(A, 2, [1, 2]))
    assert index.inexact() == [A]


def test_a_gateway_that_starts_late_asks_with_the_first_report(index_of):
    index = index_of(A)
    index.check(report(A, 7, [1, 2]))
    assert index.inexact() == [A]


def test_a_worker_that_claims_more_blocks_than_it_can_hold_does_not_fill_the_memory(index_of):
    index = index_of(A, limit=10)
    for seq in range(1, 200):
        index.apply(KvEvents(A, 1, seq, [BlocksStored(pack(np.arange(seq * 100, seq * 100 + 100, dtype=np.uint64)))]))
    assert len(index) < 5000
    assert index.inexact() == [A]


def test_plain_masks_serve_and_say_why_where_the_table_was_not_compiled(tmp_path):
    blocks, reason = fastest_blocks(str(tmp_path / "gone.so"))
    assert isinstance(blocks, BlockMasks)
    assert "without a C compiler" in reason


def test_ragged_hashes_are_refused(index_of):
    index = index_of(A)
    with pytest.raises(ValueError, match="7 bytes of packed hashes"):
        index.apply(KvEvents(A, 1, 1, [BlocksStored(b"1234567")]))


class _Truth:
    """What a worker really holds, and what it has published."""

    def __init__(self, epoch):
        self.epoch, self.seq, self.held = epoch, 0, set()


# Spread over 64 bits as real names are: digests of small numbers would collide.
NAMES = st.lists(st.integers(1, 40).map(lambda k: k * 0x9E3779B97F4A7C15 % 2**64), max_size=12)
WORKERS = st.sampled_from([WorkerId(f"w{i}") for i in range(4)])


class IndexAgainstScan(RuleBasedStateMachine):
    """Any history of events, losses, duplicates, restarts, clears, departures and snapshots."""

    blocks = staticmethod(BlockMasks)

    def __init__(self):
        super().__init__()
        self.index = BlockIndex(self.blocks())
        self.truth = {}
        self.epochs = itertools.count(1)  # new at every start of any worker
        self.published = []

    @rule(worker=WORKERS)
    def arrives(self, worker):
        if worker not in self.truth:
            self.truth[worker] = _Truth(next(self.epochs))
        self.index.add(worker, self.truth[worker].epoch, 1000)

    @rule(worker=WORKERS)
    def leaves(self, worker):
        self.truth.pop(worker, None)
        self.index.drop(worker)

    @rule(worker=WORKERS)
    def loses_its_lease_and_registers_again(self, worker):
        truth = self.truth.get(worker)
        if truth is not None:
            self.index.drop(worker)
            self.index.add(worker, truth.epoch, 1000)

    @rule(worker=WORKERS, is_told=st.booleans())
    def restarts(self, worker, is_told):
        truth = self.truth.get(worker)
        if truth is not None:
            fresh = self.truth[worker] = _Truth(next(self.epochs))
            if is_told:
                self.index.add(worker, fresh.epoch, 1000)

    @rule(
        worker=WORKERS, parts=st.lists(st.tuples(st.booleans(), NAMES), min_size=1, max_size=3), fate=st.integers(0, 9)
    )
    def publishes(self, worker, parts, fate):
        events = []
        for is_store, names in parts:
            events.append((BlocksStored if is_store else BlocksRemoved)(pack(hashes(*names))))
        self._publish(worker, events, fate)

    @rule(worker=WORKERS, fate=st.integers(0, 9))
    def clears(self, worker, fate):
        self._publish(worker, [AllCleared()], fate)

    def _publish(self, worker, events, fate):
        truth = self.truth.get(worker)
        if truth is None:
            return
        for event in events:
            match event:
                case BlocksStored(packed):
                    truth.held |= set(unpack(packed).tolist())
                case BlocksRemoved(packed):
                    truth.held -= set(unpack(packed).tolist())
                case AllCleared():
                    truth.held = set()
        truth.seq += 1
        batch = KvEvents(worker, truth.epoch, truth.seq, events)
        self.published.append(batch)
        if fate > 1:  # else lost
            self.index.apply(batch)
            if fate > 8:
                self.index.apply(batch)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def repeats_an_old_publication(self, data):
        old = data.draw(st.sampled_from(self.published))
        truth = self.truth.get(old.worker)
        if truth is not None and old.epoch <= truth.epoch:
            self.index.apply(old)

    @rule(worker=WORKERS)
    def reports(self, worker):
        truth = self.truth.get(worker)
        if truth is not None:
            self.index.check(report(worker, truth.seq, sorted(truth.held), epoch=truth.epoch))

    @rule(worker=WORKERS)
    def answers_with_a_snapshot(self, worker):
        truth = self.truth.get(worker)
        if truth is not None:
            names = hashes(*sorted(truth.held))
            self.index.apply_snapshot(Snapshot(worker, truth.epoch, truth.seq, pack(names)))

    @rule(prompt=NAMES)
    def settles(self, prompt):
        """Two reports notice whatever was lost, a snapshot heals it: then all is as a naive scan says."""
        for worker, truth in self.truth.items():
            self.index.add(worker, truth.epoch, 1000)
            for _ in range(2):
                self.index.check(report(worker, truth.seq, sorted(truth.held), epoch=truth.epoch))
        for worker in self.index.inexact():
            self.answers_with_a_snapshot(worker)
        assert self.index.inexact() == []
        expected = {}
        for worker, truth in self.truth.items():
            assert set(self.index.held(worker).tolist()) == truth.held
            assert [name for name in prompt if self.index.holds(worker, name)] == [n for n in prompt if n in truth.held]
            depth = 0
            for name in prompt:
                if name not in truth.held:
                    break
                depth += 1
            if depth:
                expected[worker] = depth
        assert self.index.match(hashes(*prompt)) == expected

    @invariant()
    def counts_and_digests_are_of_what_is_held(self):
        for worker in self.truth:
            held = self.index.held(worker)
            assert self.index.num_cached(worker) == len(held)
            assert self.index._blocks.totals(worker) == (len(held), digest(held))


class CompiledIndexAgainstScan(IndexAgainstScan):
    blocks = staticmethod(compiled)


HISTORIES = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIndexAgainstScan = IndexAgainstScan.TestCase
TestIndexAgainstScan.settings = HISTORIES
TestCompiledIndexAgainstScan = CompiledIndexAgainstScan.TestCase
TestCompiledIndexAgainstScan.settings = HISTORIES
