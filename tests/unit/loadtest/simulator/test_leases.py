import pytest

from loadtest.simulator.clock import Clock
from loadtest.simulator.leases import Leases
from planes.wire.messages import RequestId

NAME = RequestId("r")


class Kept:
    def __init__(self):
        self.clock, self.freed, self.expired = Clock(), [], []
        self.leases = Leases(
            self.clock, 10.0, free=self.freed.append, on_expired=lambda: self.expired.append(self.clock.now)
        )
        self.leases.add(NAME)

    def wait(self, until):
        self.clock.run(until=until)


@pytest.fixture
def kept():
    return Kept()


def test_what_is_not_fetched_in_time_is_freed(kept):
    kept.wait(9.0)
    assert NAME in kept.leases
    kept.wait(11.0)
    assert (kept.freed, kept.expired, NAME in kept.leases) == ([NAME], [10.0], False)


def test_what_was_taken_is_freed_once_and_does_not_expire(kept):
    kept.leases.begin_read(NAME)
    kept.leases.end_read(NAME, is_taken=True)
    kept.leases.end(NAME)
    kept.wait(11.0)
    assert (kept.freed, kept.expired) == ([NAME], [])


@pytest.mark.parametrize("end", [lambda kept: kept.leases.end(NAME), lambda kept: kept.wait(11.0)])
def test_blocks_that_are_being_read_are_freed_after_that(kept, end):
    kept.leases.begin_read(NAME)
    end(kept)
    assert kept.freed == []
    kept.leases.end_read(NAME, is_taken=False)
    assert (kept.freed, kept.expired) == ([NAME], [])


def test_what_its_reader_lost_is_kept_for_whoever_says_release(kept):
    kept.leases.begin_read(NAME)
    kept.leases.end_read(NAME, is_taken=False)
    assert (kept.freed, NAME in kept.leases) == ([], True)
