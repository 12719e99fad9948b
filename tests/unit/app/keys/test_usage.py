import asyncio
from datetime import date

import msgspec
import pytest

from app.keys.tenant import ANYBODY, Tenant
from app.keys.usage import Counts, UsageBook, UsageEntry, UsageLine
from planes.control import ControlPlaneUnavailable
from tests.fakes import FakeEntries

NOW = 1_795_824_000.0
TODAY = "2026-11-28"
DAY = date(2026, 11, 28)
ONE, OTHER = Tenant("t", account="key_1"), Tenant("u", account="file/u")


@pytest.fixture
def etcd():
    return FakeEntries()


@pytest.fixture
def now():
    return [NOW]


@pytest.fixture
def books(etcd, now):
    return [UsageBook(etcd, gateway=name, wall_clock=lambda: now[0]) for name in ("a", "b")]


def stored(etcd, name):
    return msgspec.json.decode(etcd.values[name].value, type=UsageEntry)


async def test_what_gateways_have_seen_adds_up(books, etcd):
    for book in books:
        book.add(ONE, "m", Counts(1, 10, 5))
        book.add(ONE, "n", Counts(1, 1, 1))
        book.add(OTHER, "m", Counts(1, 2, 3))
    await asyncio.gather(*(book.flush(etcd) for book in books))
    books[0].add(ONE, "m", Counts(0, 0, 2))
    await books[0].flush(etcd)
    lines = await books[1].lines(DAY, DAY, None)
    assert lines == [
        UsageLine(TODAY, "file/u", "u", "m", 2, 4, 6),
        UsageLine(TODAY, "key_1", "t", "m", 2, 20, 12),
        UsageLine(TODAY, "key_1", "t", "n", 2, 2, 2),
    ]
    assert await books[1].lines(DAY, DAY, "key_1") == lines[1:]


async def test_what_is_not_in_etcd_yet_is_told_by_the_gateway_that_knows_it(books, etcd):
    books[0].add(ONE, "m", Counts(1, 10, 5))
    assert await books[0].lines(DAY, DAY, "key_1") == [UsageLine(TODAY, "key_1", "t", "m", 1, 10, 5)]
    await books[0].flush(etcd)
    assert await books[0].lines(DAY, DAY, None) == [UsageLine(TODAY, "key_1", "t", "m", 1, 10, 5)]


@pytest.mark.parametrize("has_arrived", [True, False])
async def test_an_addition_that_nobody_confirmed_counts_once(books, etcd, has_arrived):
    book = books[0]
    book.add(ONE, "m", Counts(1, 10, 5))
    etcd.fails_after_swap, etcd.fails_before_swap = has_arrived, not has_arrived
    with pytest.raises(ControlPlaneUnavailable):
        await book.flush(etcd)
    book.add(ONE, "m", Counts(1, 1, 1))
    etcd.fails_after_swap = etcd.fails_before_swap = False
    assert await book.lines(DAY, DAY, None) == [UsageLine(TODAY, "key_1", "t", "m", 2, 11, 6)]
    await book.flush(etcd)
    await book.flush(etcd)
    assert stored(etcd, f"{TODAY}/key_1").models == {"m": Counts(2, 11, 6)}


async def test_usage_is_of_the_day_on_which_it_was_counted(books, etcd, now):
    book = books[0]
    book.add(ONE, "m", Counts(1, 10, 0))
    now[0] += 86_400
    book.add(ONE, "m", Counts(0, 0, 5))
    await book.flush(etcd)
    assert [(line.day, line.completion_tokens) for line in await book.lines(DAY, date(2026, 11, 29), "key_1")] == [
        (TODAY, 0),
        ("2026-11-29", 5),
    ]
    assert len(await book.lines(DAY, DAY, None)) == 1


async def test_old_days_are_forgotten(books, etcd, now):
    books[0].add(ONE, "m", Counts(1))
    await books[0].flush(etcd)
    now[0] += 401 * 86_400
    await books[0].flush(etcd)
    assert not etcd.values


async def test_where_there_are_no_keys_nothing_is_counted(books, etcd):
    books[0].add(ANYBODY, "m", Counts(1, 1, 1))
    await books[0].flush(etcd)
    assert not etcd.values
    assert list(books[0].gauges()) == []


async def test_what_cannot_be_read_is_begun_anew(books, etcd):
    await etcd.swap(f"{TODAY}/key_1", b"{", revision=0)
    assert await books[0].lines(DAY, DAY, None) == []
    books[0].add(ONE, "m", Counts(1, 1, 1))
    await books[0].flush(etcd)
    assert stored(etcd, f"{TODAY}/key_1").models == {"m": Counts(1, 1, 1)}


def test_metrics_have_no_more_tenants_than_a_hundred(books):
    for number in range(150):
        books[0].add(Tenant(f"t{number}", account=f"key_{number}"), "m", Counts(1, 2, 3))
    totals = {each.labels[0][1]: each.value for each in books[0].gauges() if each.name == "tenant_prompt_tokens"}
    assert len(totals) == 101
    assert (totals["t0"], totals["(others)"]) == (2, 100)


async def test_at_its_end_a_gateway_adds_what_is_left(books, etcd):
    books[0].add(ONE, "m", Counts(1, 1, 1))
    await books[0].stop()
    assert stored(etcd, f"{TODAY}/key_1").models == {"m": Counts(1, 1, 1)}
