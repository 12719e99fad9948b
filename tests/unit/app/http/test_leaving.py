import pytest

from app.http.leaving import Departure


class Clock:
    """Timers that ring when a test says so."""

    def __init__(self):
        self.timers = {}

    def call_later(self, delay_s, call):
        timer = Timer(self.timers)
        self.timers[timer] = (delay_s, call)
        return timer

    def ring(self):
        for timer in list(self.timers):
            self.timers.pop(timer)[1]()

    @property
    def delays(self):
        return [delay_s for delay_s, _ in self.timers.values()]


class Timer:
    def __init__(self, timers):
        self._timers = timers

    def cancel(self):
        self._timers.pop(self, None)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stops():
    return []


@pytest.fixture
def signal(stops):
    return lambda departure: departure.signalled(lambda: stops.append("stop"))


def test_without_a_delay_each_signal_stops(clock, stops, signal):
    departure = Departure(0.0, call_later=clock.call_later)
    assert not departure.is_under_way
    signal(departure)
    assert (departure.is_under_way, stops, clock.delays) == (True, ["stop"], [])
    signal(departure)
    assert stops == ["stop", "stop"]


def test_with_a_delay_it_is_told_at_once_and_stops_later(clock, stops, signal):
    departure = Departure(7.0, call_later=clock.call_later)
    signal(departure)
    assert (departure.is_under_way, stops, clock.delays) == (True, [], [7.0])
    clock.ring()
    assert stops == ["stop"]
    signal(departure)
    assert stops == ["stop", "stop"]


def test_a_second_signal_ends_the_delay_and_a_third_one_the_answers(clock, stops, signal):
    departure = Departure(7.0, call_later=clock.call_later)
    signal(departure)
    signal(departure)
    assert (stops, clock.delays) == (["stop"], [])
    clock.ring()
    assert stops == ["stop"]
    signal(departure)
    assert stops == ["stop", "stop"]
