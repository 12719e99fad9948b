from loadtest.simulator.clock import Clock


def test_calls_come_in_the_order_of_their_instants():
    clock, seen = Clock(), []
    for name, at in (("late", 2.0), ("first", 1.0), ("second", 1.0), ("beyond", 9.0)):
        clock.call_at(at, seen.append, name)
    clock.run(until=5.0)
    assert (seen, clock.now) == (["first", "second", "late"], 5.0)


def test_what_is_to_happen_soon_happens_before_anything_else():
    clock, seen = Clock(), []

    def first():
        clock.call_soon(seen.append, "soon")
        seen.append("first")

    clock.call_at(1.0, first)
    clock.call_at(1.0, seen.append, "second")
    clock.run(until=5.0)
    assert seen == ["first", "soon", "second"]


def test_a_cancelled_call_does_not_happen():
    clock, seen = Clock(), []
    clock.call_later(1.0, seen.append, "never").cancel()
    clock.call_later(2.0, seen.append, "then")
    clock.call_soon(seen.append, "never").cancel()
    clock.run(until=5.0)
    assert seen == ["then"]


def test_time_stands_still_when_it_is_over():
    clock, seen = Clock(), []
    for at in (1.0, 2.0, 3.0):
        clock.call_at(at, seen.append, at)
    clock.run(until=5.0, is_over=lambda: len(seen) == 2)
    assert (seen, clock.now) == ([1.0, 2.0], 2.0)
