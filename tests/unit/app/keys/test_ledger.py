import asyncio

import msgspec
import pytest

from app.auth import TooManyConcurrent
from app.keys.budget import Budget
from app.keys.ledger import Ledger, PromptOverLimit, RateLimited, duration
from app.keys.tenant import ANYBODY, Limits, Tenant
from planes.entries import Entry
from tests.fakes import FakeEntries

NOW = 1_000_020.0


@pytest.fixture
def etcd():
    return FakeEntries()


@pytest.fixture
async def ledgers(etcd):
    """Two gateways."""
    both = [Ledger(etcd, gateway=name, wall_clock=lambda: NOW) for name in ("a", "b")]
    tasks = [asyncio.create_task(each.run()) for each in both]
    yield both
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def tenant(max_concurrent=None, **limits):
    return Tenant("t", account="key_1", limits=Limits(**limits), max_concurrent=max_concurrent)


def budget(etcd):
    return msgspec.json.decode(etcd.values["key_1"].value, type=Budget)


async def reserve(ledger, who, prompt_tokens=1, answer_tokens=0, slots=1):
    return await ledger.reserve(who, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, slots=slots)


async def test_who_has_no_limit_costs_nothing(ledgers, etcd):
    assert await reserve(ledgers[0], ANYBODY) is None
    assert ledgers[0].headers(ANYBODY) == []
    assert not etcd.values


async def test_two_gateways_together_let_in_what_the_limit_says(ledgers, etcd):
    who = tenant(requests_per_minute=50)
    results = await asyncio.gather(*(reserve(ledgers[n % 2], who) for n in range(80)), return_exceptions=True)
    refused = [each for each in results if isinstance(each, RateLimited)]
    assert len(refused) == 30
    assert refused[0].retry_after_s == 60 - NOW % 60
    assert "50 requests per minute; 0 are left" in str(refused[0])


async def test_most_requests_wait_for_nothing(ledgers, etcd):
    who = tenant(requests_per_minute=100_000)
    for _ in range(1000):
        await reserve(ledgers[0], who)
    assert ledgers[0].num_waited == 1
    assert etcd.num_swaps == 1


async def test_a_slice_that_runs_low_is_refilled_before_somebody_has_to_wait(ledgers, etcd):
    who = tenant(requests_per_minute=1000)
    for _ in range(400):
        await reserve(ledgers[0], who)
        await asyncio.sleep(0)
    assert ledgers[0].num_waited == 1
    assert etcd.num_swaps > 3


async def test_tokens_are_reserved_at_the_start_and_settled_at_the_end(ledgers):
    who = tenant(tokens_per_minute=100)
    first = await reserve(ledgers[0], who, 10, 90)
    with pytest.raises(RateLimited, match="0 are left and this request needs 20"):
        await reserve(ledgers[0], who, 10, 10)
    first.spent(25)
    first.close()
    second = await reserve(ledgers[0], who, 10, 65)
    second.close()
    first.spent(5)
    assert dict(ledgers[0].headers(who)) == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "70",
        "x-ratelimit-reset-tokens": duration(60 - NOW % 60),
    }


async def test_a_prompt_that_never_fits_is_the_clients_mistake_and_a_long_answer_is_not(ledgers):
    who = tenant(tokens_per_minute=100)
    with pytest.raises(PromptOverLimit, match="has 101 tokens and the key of 't' allows 100"):
        await reserve(ledgers[0], who, 101)
    assert await reserve(ledgers[0], who, 100, 5000)


async def test_sequences_at_once_count_over_gateways(ledgers):
    who = tenant(max_concurrent=3)
    held = await reserve(ledgers[0], who, slots=2)
    with pytest.raises(TooManyConcurrent, match="2 sequences of 't' are under way, this request is for 2"):
        await reserve(ledgers[1], who, slots=2)
    other = await reserve(ledgers[1], who)
    with pytest.raises(TooManyConcurrent):
        await reserve(ledgers[0], who)
    held.close()
    await reserve(ledgers[0], who, slots=2)
    other.close()


async def test_a_gateway_whose_wall_clock_is_set_back_goes_on_saying_what_it_holds(etcd):
    wall, now = NOW, 100.0
    ledger = Ledger(etcd, gateway="a", wall_clock=lambda: wall, clock=lambda: now)
    running = asyncio.create_task(ledger.run())
    await reserve(ledger, tenant(max_concurrent=3))
    wall, now = NOW - 3600.0, now + 6.0
    etcd.told.clear()
    ledger._look_through()
    await asyncio.wait_for(etcd.told.wait(), 60)
    assert budget(etcd).slots["a"].told_at == NOW - 3600.0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_who_has_not_asked_for_long_is_forgotten_though_the_wall_clock_was_set_back(etcd):
    wall, now = NOW, 100.0
    ledger = Ledger(etcd, gateway="a", wall_clock=lambda: wall, clock=lambda: now)
    ledger._account(tenant(max_concurrent=3))
    wall, now = NOW - 3600.0, now + 121.0
    ledger._look_through()
    assert not ledger._accounts


async def test_without_etcd_a_gateway_goes_on_and_tells_later(ledgers, etcd):
    who = tenant(requests_per_minute=10)
    await reserve(ledgers[0], who)
    etcd.is_away = True
    results = [await _outcome(ledgers[0], who) for _ in range(12)]
    assert results == [None] * 9 + ["rate_limit_exceeded"] * 3
    assert await _outcome(ledgers[1], who) is None, "it knows of nobody else's"
    etcd.told.clear()
    etcd.is_away = False
    while budget(etcd).taken[0] < 11:  # until both have told
        await etcd.told.wait()
        etcd.told.clear()
    assert await _outcome(ledgers[1], who) == "rate_limit_exceeded"


async def test_what_was_taken_and_not_answered_is_in_hand_when_etcd_is_back(ledgers, etcd):
    who = tenant(requests_per_day=1000)
    etcd.fails_after_swap = True
    await reserve(ledgers[0], who)
    taken = budget(etcd)
    assert taken.taken[1] > 1, "a slice beside the one that was needed"
    etcd.fails_after_swap = False
    while budget(etcd).last == taken.last:  # it tells what it has let in meanwhile
        etcd.told.clear()
        await etcd.told.wait()
    await asyncio.sleep(0)
    share = ledgers[0]._accounts["key_1"].share
    assert budget(etcd).taken[1] + share.owed[1] - share.in_hand[1] == 1, "all but what was used is in its hand"


async def test_what_was_taken_and_not_answered_lets_nobody_in_twice(ledgers, etcd):
    who = tenant(max_concurrent=4, requests_per_day=6)
    etcd.fails_after_swap = True
    held = [await _outcome(ledgers[0], who) for _ in range(6)]
    assert held == [None] * 4 + ["concurrency_limit"] * 2
    etcd.fails_after_swap = False
    last = budget(etcd).last
    while budget(etcd).last == last:
        etcd.told.clear()
        await etcd.told.wait()
    assert [await _outcome(each, who) for each in ledgers] == ["concurrency_limit"] * 2


async def _outcome(ledger, who):
    try:
        await reserve(ledger, who)
    except (RateLimited, TooManyConcurrent) as exc:
        return exc.code


async def test_a_request_that_goes_while_it_waits_takes_nothing(ledgers, etcd):
    who = tenant(requests_per_minute=1)
    waiting = asyncio.create_task(reserve(ledgers[0], who))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await reserve(ledgers[0], who)


async def test_at_its_end_a_gateway_gives_back_what_it_has_in_hand(ledgers, etcd):
    who = tenant(requests_per_minute=80)
    await reserve(ledgers[0], who)
    assert budget(etcd).taken[0] > 1
    await ledgers[0].stop()
    assert budget(etcd).taken[0] == 1


async def test_an_entry_that_cannot_be_read_is_replaced(ledgers, etcd):
    etcd.values["key_1"] = Entry(b"{", 0)
    assert await reserve(ledgers[0], tenant(requests_per_minute=80))
    assert budget(etcd).taken[0] > 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1s"), (59.2, "1m0s"), (360, "6m0s"), (86_341, "23h59m1s"), (3600, "1h0m0s")]
)
def test_durations_are_written_as_openai_does(seconds, text):
    assert duration(seconds) == text
