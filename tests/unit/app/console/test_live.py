import json
from contextlib import ExitStack, aclosing

import pytest

from app.console.live import _MOST_REQUESTS, MOST_WATCHERS, Live, TooManyWatchers, _sample


class Clock:
    """Stands still until it is told."""

    def __init__(self):
        self.now = 1000.2

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def live(gateway, clock):
    return Live(
        gateway.fleet,
        gateway.router,
        gateway.dispatcher,
        gateway.routing_config,
        clock=clock,
        wall_clock=lambda: 1_700_000_000.0 + clock.now,
        about={"version": "1"},
    )


def parsed(frame):
    assert frame.endswith(b"\n\n")
    fields = dict(line.split(": ", 1) for line in frame.decode().strip().split("\n"))
    return fields["event"], json.loads(fields["data"])


async def whole(live):
    async with aclosing(live.frames()) as frames:
        return parsed(await anext(frames))


def tick(live, clock, seconds=1.0):
    clock.now += seconds
    live._advance()
    return parsed(live._delta)[1]


async def test_a_watcher_first_gets_everything(live, fleet):
    with live.watched():
        event, told = await whole(live)
    assert (event, told["seq"], told["about"]) == ("state", 0, {"version": "1"})
    assert sorted(told["workers"]) == ["both-3", "decode-1", "decode-2", "prefill-0"]
    worker = told["workers"]["prefill-0"]
    assert (worker["role"], worker["state"], worker["num_blocks"]) == ("prefill", "ready", 20_000)
    assert not any("127.0.0.1" in json.dumps(row) for row in told["workers"].values()), "addresses are not shown"
    assert told["totals"]["slos"] == {"ttft_s": 2.0, "itl_s": 0.05, "models": {}}


async def test_then_only_what_changed(live, fleet, gateway, clock):
    with live.watched():
        assert tick(live, clock)["workers"] == {}
        gateway.fleet.load_reported(fleet._report(fleet._workers[1]))
        changed = tick(live, clock)["workers"]
        assert list(changed) == ["decode-1"]
        assert "num_running" in changed["decode-1"]
        assert "model" not in changed["decode-1"], "it is what it was"
        gateway.fleet.worker_down("prefill-0")
        assert tick(live, clock)["gone"] == ["prefill-0"]


async def test_tokens_per_second_are_those_of_all_reports_since_the_tick_before(live, fleet, gateway, clock):
    with live.watched():
        tick(live, clock)
        report = fleet._report(fleet._workers[1])
        decoded = sum(step.batch for step in report.steps)
        for _ in range(2):
            gateway.fleet.load_reported(report)
        told = tick(live, clock, 2.0)
        assert told["workers"]["decode-1"]["decode_tokens_per_s"] == pytest.approx(decoded, rel=0.01)
        assert tick(live, clock)["workers"]["decode-1"]["decode_tokens_per_s"] == 0


async def test_requests_are_told_once_and_handovers_are_added_up(live, fleet, clock):
    with live.watched():
        tick(live, clock)
        for _ in range(20):
            fleet.end_request(ago_s=0.0)
        told = tick(live, clock)
        assert told["ended"]["count"] == len(told["requests"]) == 20
        moved = [row for row in told["requests"] if any(kind == "handover" for kind, *_ in row["stages"])]
        assert sum(count for _, _, count, _, _ in told["handovers"]) == len(moved) > 0
        assert all(num_bytes > 0 and seconds > 0 for *_, num_bytes, seconds in told["handovers"])
        assert tick(live, clock)["requests"] == []
        assert told["totals"]["prompt_tokens"] == sum(row["prompt_tokens"] for row in told["requests"])


async def test_a_page_begins_with_the_requests_before_it(live, fleet):
    for _ in range(5):
        fleet.end_request(ago_s=0.0)
    with live.watched():
        _, told = await whole(live)
    assert len(told["requests"]) == 5
    assert told["totals"]["prompt_tokens"] > 0


async def test_of_many_requests_a_sample_is_told_and_all_are_counted(live, fleet, clock):
    with live.watched():
        tick(live, clock)
        for _ in range(_MOST_REQUESTS * 3):
            fleet.end_request(ago_s=0.0)
        told = tick(live, clock)
        assert (len(told["requests"]), told["ended"]["count"]) == (_MOST_REQUESTS, _MOST_REQUESTS * 3)


def test_a_sample_is_even_and_in_order():
    assert _sample([1, 2], 3) == [1, 2]
    assert _sample(list(range(10)), 5) == [1, 3, 5, 7, 9]


async def test_all_watchers_get_the_same_bytes_and_one_that_missed_a_tick_everything(live, fleet, clock):
    with live.watched():
        live._advance()
        assert live._delta == b"", "it is the tick that the first state was of"
        clock.now += 1.0
        live._advance()
        first = live._delta
        live._advance()
        assert live._delta is first
    live._until_tick = moved(clock, [1.0, 1.0])
    with live.watched():
        async with aclosing(live.frames()) as frames:
            assert parsed(await anext(frames))[0] == "state"
            assert parsed(await anext(frames))[0] == "delta"
            clock.now += 1.0
            live._advance()  # for another watcher, while this one was busy
            assert parsed(await anext(frames))[0] == "state"
            with pytest.raises(StopAsyncIteration):
                await anext(frames)


def moved(clock, seconds):
    """In place of waiting: the clock goes on, so often."""
    left = list(seconds)

    async def until_tick():
        if not left:
            return False
        clock.now += left.pop(0)
        return True

    return until_tick


async def test_while_nobody_looks_nothing_is_kept(live, fleet, gateway, clock):
    assert (len(gateway.fleet.reports), len(gateway.dispatcher.endings)) == (0, 0)
    with live.watched(), live.watched():
        assert (len(gateway.fleet.reports), len(gateway.dispatcher.endings)) == (1, 1)
        fleet.end_request(ago_s=0.0)
        tick(live, clock)
    assert (len(gateway.fleet.reports), len(gateway.dispatcher.endings)) == (0, 0)
    assert (live._workers, live._ended, live._delta, live._hits, len(live._window)) == ({}, [], b"", {}, 0)


async def test_the_number_of_watchers_is_bounded(live):
    with ExitStack() as watching:
        for _ in range(MOST_WATCHERS):
            watching.enter_context(live.watched())
        with pytest.raises(TooManyWatchers, match=str(MOST_WATCHERS)), live.watched():
            pass
    with live.watched():
        assert live.num_watchers == 1


async def test_a_gateway_that_stops_ends_the_streams(gateway):
    live = gateway.live
    with live.watched():
        frames = live.frames()
        await anext(frames)
        live.stop()
        with pytest.raises(StopAsyncIteration):
            await anext(frames)
