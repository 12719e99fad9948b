import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.blocks import digest, pack, unpack
from planes.wire.messages import AllCleared, BlocksRemoved, BlocksStored, WorkerId, WorkerState
from workers.engine.base import EngineLoad
from workers.publications import CachedBlocks, Publications

WORKER = WorkerId("decode-1")


def stored(*names):
    return BlocksStored(pack(np.array(names, dtype=np.uint64)))


def removed(*names):
    return BlocksRemoved(pack(np.array(names, dtype=np.uint64)))


NAMES = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=8)
EVENTS = st.builds(lambda names: stored(*names), NAMES) | st.builds(lambda names: removed(*names), NAMES)


@given(history=st.lists(EVENTS | st.just(AllCleared())))
def test_the_held_set_and_its_digest_follow_any_history(history):
    held, naive = CachedBlocks(), set()
    for event in history:
        held.apply(event)
        match event:
            case BlocksStored(hashes):
                naive |= set(unpack(hashes).tolist())
            case BlocksRemoved(hashes):
                naive -= set(unpack(hashes).tolist())
            case _:
                naive.clear()
    assert set(unpack(held.packed()).tolist()) == naive
    assert len(held) == len(naive)
    assert held.digest == digest(np.array(list(naive), dtype=np.uint64))


def test_what_changed_is_published_once_in_order_and_numbered():
    told = []
    publications = Publications(WORKER, 7, told.append)
    publications.seal()
    publications.kv_changed([stored(8), stored(1), removed(8)])
    publications.seal()
    publications.seal()
    publications.kv_changed([stored(3)])
    report = publications.report(EngineLoad(num_running=2), [], WorkerState.READY)
    assert [(batch.worker, batch.epoch, batch.seq) for batch in told] == [(WORKER, 7, 1), (WORKER, 7, 2)]
    assert [event for batch in told for event in batch.events] == [stored(8, 1), removed(8), stored(3)]
    assert (report.seq, report.num_cached, report.digest, report.num_running) == (2, 2, 1 ^ 3, 2)


@given(
    history=st.lists(EVENTS | st.just(AllCleared()), max_size=40),
    num_blocks=st.integers(0, 3000),
    limit=st.sampled_from([1024, 4096, 65536]),
)
def test_no_publication_is_longer_than_the_server_takes_and_all_blocks_arrive(history, num_blocks, limit):
    told, held, told_of = [], CachedBlocks(), CachedBlocks()
    publications = Publications(WORKER, 7, told.append, message_bytes=lambda: limit)
    events = [*history, stored(*range(num_blocks))]
    publications.kv_changed(events)
    publications.seal()
    for event in events:
        held.apply(event)
    for batch in told:
        assert len(msgspec.msgpack.encode(batch)) <= limit
        for event in batch.events:
            told_of.apply(event)
    assert (len(told_of), told_of.digest) == (len(held), held.digest)
