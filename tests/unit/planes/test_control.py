"""The control plane without etcd: addresses, pauses, and what the directory makes of what it is told."""

import asyncio
import itertools
import random
from types import SimpleNamespace

import msgspec
import pytest
import structlog.testing
from aetcd import Transactions

from planes.control import Etcd, Registrar, WorkerDirectory, WorkerIdTaken, _pauses, workers_prefix
from planes.wire.messages import EngineFacts, Registration, Role, WorkerId, WorkerState
from tests.fakes import DEEP

FACTS = EngineFacts(
    block_size=16, num_blocks=8, context_length=64, max_batch=2, max_step_tokens=32, bytes_per_block=1, vocab_size=9
)


def registration(worker: str, epoch: int = 1, state: WorkerState = WorkerState.READY) -> Registration:
    return Registration(
        worker=WorkerId(worker),
        epoch=epoch,
        role=Role.BOTH,
        model="m",
        address="127.0.0.1:1",
        engine="sim",
        facts=FACTS,
        card_digest="0" * 64,
        state=state,
    )


def key(worker: str) -> bytes:
    return workers_prefix("ns") + worker.encode()


def entry(worker: str, epoch: int = 1) -> tuple[bytes, bytes]:
    return key(worker), msgspec.json.encode(registration(worker, epoch))


class Seen:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []
        self.directory = WorkerDirectory(
            Etcd("http://127.0.0.1:1"),
            "ns",
            on_up=lambda r: self.events.append(("up", r.worker, r.epoch)),
            on_down=lambda w: self.events.append(("down", w, 0)),
            grace_s=1000.0,
        )

    def take(self) -> list[tuple[str, str, int]]:
        events, self.events = self.events, []
        return events


@pytest.fixture
def seen() -> Seen:
    return Seen()


def test_pauses_grow_to_five_seconds_and_vary() -> None:
    pauses = list(itertools.islice(_pauses(random.Random(1)), 50))
    assert 0.05 <= pauses[0] <= 0.1
    assert all(2.5 <= pause <= 5.0 for pause in pauses[10:])
    assert len(set(pauses)) == len(pauses)


async def test_the_same_listing_again_changes_nothing(seen: Seen) -> None:
    seen.directory._take_listing(dict([entry("a"), entry("b")]))
    assert seen.take() == [("up", "a", 1), ("up", "b", 1)]
    seen.directory._take_listing(dict([entry("a"), entry("b")]))
    assert seen.take() == []


async def test_a_changed_registration_is_up_again(seen: Seen) -> None:
    seen.directory._take_change(*entry("a"))
    seen.directory._take_change(*entry("a", epoch=2))
    assert seen.take() == [("up", "a", 1), ("up", "a", 2)]


async def test_a_deleted_entry_is_down_at_once_and_only_once(seen: Seen) -> None:
    seen.directory._take_change(*entry("a"))
    seen.directory._take_change(key("a"), None)
    seen.directory._take_change(key("a"), None)
    assert seen.take() == [("up", "a", 1), ("down", "a", 0)]


async def test_a_worker_missing_from_a_listing_has_a_grace(seen: Seen) -> None:
    seen.directory._take_listing(dict([entry("a"), entry("b"), entry("c")]))
    seen.take()
    seen.directory._take_listing({})
    seen.directory._take_change(*entry("b"))
    assert seen.take() == []
    assert set(seen.directory.workers) == {"a", "b", "c"}
    seen.directory._drop_missing()
    assert seen.take() == [("down", "a", 0), ("down", "c", 0)]
    assert set(seen.directory.workers) == {"b"}


@pytest.mark.parametrize(
    "value", [b"", b"{", b"\xff\xfe", b"[]", b'{"worker": 1}', msgspec.json.encode(registration("other")), DEEP]
)
async def test_a_malformed_entry_is_skipped_and_the_last_good_one_stays(seen: Seen, value: bytes) -> None:
    seen.directory._take_change(*entry("a"))
    seen.directory._take_listing({key("a"): value, key("b"): value, workers_prefix("ns") + b"\xff": value})
    assert seen.take() == [("up", "a", 1)]
    assert set(seen.directory.workers) == {"a"}


async def test_what_is_wrong_with_an_entry_is_said_once(seen: Seen) -> None:
    with structlog.testing.capture_logs() as logs:
        for value in (b"{", b"{", b"[]", b"{"):
            seen.directory._take_change(key("a"), value)
        seen.directory._take_change(*entry("a"))
        seen.directory._take_change(key("a"), b"{")
    assert [log["event"] for log in logs] == ["registration.malformed"] * 4


class BusyEtcd:
    """A client of an etcd with one entry; somebody else writes it right after it was first read."""

    transactions = Transactions()

    def __init__(self, others: bytes) -> None:
        self.others = others
        self.entries: list[SimpleNamespace] = []

    async def lease(self, _ttl_s: int) -> SimpleNamespace:
        return SimpleNamespace(id=7)

    async def get_range(self, _start: bytes, _end: None) -> list[SimpleNamespace]:
        found = self.entries[-1:]
        if not found:
            self.entries.append(SimpleNamespace(value=self.others, lease=1, mod_revision=1))
        return found

    async def transaction(self, compare, success, failure):
        assert not failure
        is_unchanged = compare[0].build_message().mod_revision == len(self.entries)
        if is_unchanged:
            self.entries.append(SimpleNamespace(value=success[0].value, lease=success[0].lease))
        return is_unchanged, []


async def gone(_: Registration) -> bool:
    return False


async def running(_: Registration) -> bool:
    return True


async def test_the_id_of_a_worker_that_answers_is_refused() -> None:
    etcd = BusyEtcd(entry("a", epoch=1)[1])
    registrar = Registrar(Etcd("http://127.0.0.1:1"), "ns", registration("a", epoch=2), is_running=running)
    with pytest.raises(WorkerIdTaken, match=r"the worker at 127\.0\.0\.1:1 has it"):
        await registrar._stay_registered(etcd, lambda: None)
    assert not registrar.registered.is_set()


async def test_an_entry_written_between_the_look_and_the_put_is_looked_at_before_it_is_replaced() -> None:
    (_, other), (_, own) = entry("a", epoch=1), entry("a", epoch=2)
    etcd = BusyEtcd(other)
    registrar = Registrar(Etcd("http://127.0.0.1:1"), "ns", registration("a", epoch=2), is_running=gone)
    task = asyncio.create_task(registrar._stay_registered(etcd, lambda: None))
    await registrar.registered.wait()
    assert [(each.value, each.lease) for each in etcd.entries] == [(other, 1), (own, 7)]
    task.cancel()
