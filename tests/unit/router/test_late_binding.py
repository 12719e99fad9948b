"""A walk decides the same with its loop over few workers and with its arrays over many, and knows who will compute
what waits.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from planes.wire.messages import RequestId, Role, WorkerId
from router.decision import Decision
from router.fleet import Fleet
from router.late_binding import LateBinding
from router.queue import Bids, Queue
from router.request import Explanation, RoutableRequest
from router.settings import RouterSettings
from tests.fakes import FACTS, candidate, registration

LIMIT_S = 0.5
NAMES = ("a", "b", "c")
seconds = st.sampled_from((0.0, 0.1, 0.3, 0.6, 1.0))

bids = st.dictionaries(st.sampled_from(NAMES), st.tuples(seconds, seconds), min_size=2)
"""Per worker: cost without its queue, and seconds of prompt work."""
requests = st.tuples(st.sampled_from((10, 50, 300, 400)), bids)
backlogs = st.fixed_dictionaries({name: st.tuples(seconds, st.sampled_from((0, 50, 300))) for name in NAMES})
"""Per worker: seconds of work, and tokens of a prompt that shorter ones pass."""


def walked(backlog, waiting, *, num_others):
    """Who is asked for, in order, and the work that lies before those that follow; `num_others` serve another model."""
    fleet = Fleet()
    facts = replace(FACTS, is_shortest_first=True, max_step_tokens=16)
    for name in NAMES:
        fleet.up(replace(registration(name, Role.BOTH), facts=facts))
    for number in range(num_others):
        fleet.up(registration(f"other{number}", model="other"))
        fleet.workers[WorkerId(f"other{number}")].plan.ends_at = 1e9
    for name, (busy_s, tokens) in backlog.items():
        if tokens:
            fleet.reserve(routable(f"bound to {name}", tokens), candidate(name), 0.0)
        fleet.workers[WorkerId(name)].plan.ends_at = busy_s
    queue = Queue(RouterSettings())
    binding = LateBinding(fleet, queue)
    options_of = {}
    for number, (tokens, costs) in enumerate(waiting):
        request = routable(f"r{number}", tokens)
        queue.add(request, tokens, 0.1, Explanation(request.request, "p", tokens, 0.0), now=0.0)
        options = tuple(candidate(name, work_s=work_s, total_s=cost_s) for name, (cost_s, work_s) in costs.items())
        options_of[request.request] = options
        walk = binding.walk(0.0)
        held = next(each for each in queue.walk() if each.request is request)
        walk.held(
            held,
            Decision(
                chosen=options[0],
                candidates=options,
                kept=options,
                is_held=True,
                held_because="busy",
                max_backlog_s=LIMIT_S,
                lacks_room=False,
                spares_streams=False,
                makes_way_because="",
            ),
        )
        held.blocked = -1
    walk, asked = binding.walk(0.0), []
    for each in walk:
        asked.append(each.request.request)
        option = min(options_of[each.request.request], key=lambda option: option.total_s)
        fleet.reserve(each.request, option, 0.0)
        walk.bound(option)
    return asked, walk.ahead, binding.wakeup, {name: binding.shares.get(WorkerId(name)) for name in NAMES}


def routable(name, tokens):
    return RoutableRequest(RequestId(name), "sim", np.empty(0, np.uint64), tokens, 20, 1e9)


@given(backlogs, st.lists(requests, min_size=2, max_size=7))
def test_few_and_many_workers_are_walked_alike(backlog, waiting):
    assert walked(backlog, waiting, num_others=0) == walked(backlog, waiting, num_others=30)


def test_a_request_whose_cheapest_worker_is_busy_is_passed_over_and_lies_before_the_next():
    busy = {"a": (1.0, 0), "b": (0.0, 0), "c": (0.0, 0)}
    waits_for_a = (100, {"a": (0.1, 0.3), "b": (5.0, 0.3)})
    takes_b = (100, {"b": (0.1, 0.3)})
    for num_others in (0, 30):
        asked, ahead, _, _ = walked(busy, [waits_for_a, takes_b], num_others=num_others)
        assert asked == ["r1"]
        assert ahead == {"a": 0.3}


def shares_of(waiting, backlogs_s, *, times=1):
    """What `share_out` makes of requests of which each costs so much, and works so long, on each worker."""
    fleet, queue = Fleet(), Queue(RouterSettings())
    for name in NAMES:
        fleet.up(registration(name, Role.BOTH))
    binding = LateBinding(fleet, queue)
    binding.walk(0.0)
    for number, costs in enumerate(waiting):
        request = routable(f"r{number}", 100)
        queue.add(request, 100, 0.1, Explanation(request.request, "p", 100, 0.0), now=0.0)
        rows = [binding.rows[WorkerId(name)] for name in costs]
        own_s, work_s = zip(*costs.values(), strict=True)
        queue.get(request.request).bids = Bids(binding.version, 0.0, rows, own_s, work_s, LIMIT_S, None)
    for number in range(times):
        binding.share_out(list(queue.walk()), backlogs_s, 1.0 + number)
    return [binding.shares[WorkerId(name)] for name in NAMES]


def test_those_who_may_go_anywhere_are_shared_out_evenly_whatever_lies_before_the_first():
    anywhere = dict.fromkeys(NAMES, (0.1, 0.1))
    for backlogs_s in ([0.0] * 3, [0.3, 0.0, 0.0]):
        assert shares_of([anywhere] * 60, backlogs_s, times=9) == pytest.approx([1 / 3] * 3, abs=0.06)


def test_those_who_cost_far_more_elsewhere_wait_for_the_worker_where_they_do_not():
    tied, anywhere = {"a": (0.1, 0.1), "b": (90.0, 9.0), "c": (90.0, 9.0)}, dict.fromkeys(NAMES, (0.1, 0.1))
    a, b, c = shares_of([tied, anywhere, anywhere] * 20, [0.0] * 3, times=9)
    assert (a, b, c) == pytest.approx([1 / 3] * 3, abs=0.06)
    a, b, c = shares_of([tied, tied, anywhere] * 20, [0.0] * 3, times=9)
    assert (a, b, c) == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=0.06)


def test_a_request_waits_for_a_busy_worker_where_it_would_keep_many_waiting_at_the_free_one():
    either = (100, {"a": (0.1, 0.1), "b": (0.1, 0.3)})
    tied = (100, {"b": (0.1, 0.1)})
    busy = {"a": (0.6, 0), "b": (0.0, 0), "c": (0.0, 0)}
    for num_others in (0, 30):
        asked, ahead, _, _ = walked(busy, [either, *[tied] * 5], num_others=num_others)
        assert asked == ["r1", "r2", "r3", "r4", "r5"]
        assert ahead == {"a": 0.1}
        asked, ahead, _, _ = walked(busy, [either], num_others=num_others)
        assert (asked, ahead) == (["r0"], {})


def test_a_worker_that_gives_up_prefilling_shortens_nobodys_wait():
    fleet, queue = Fleet(), Queue(RouterSettings())
    binding = LateBinding(fleet, queue)
    queue.add(routable("before", 1000), 1000, 6.0, Explanation(RequestId("before"), "p", 1000, 0.0), now=0.0)
    for name in NAMES:
        fleet.up(registration(name, Role.BOTH))
    three = binding.wait_s(routable("next", 10), 5.0)
    fleet.up(replace(registration("c", Role.BOTH), becoming=Role.DECODE))
    assert three == 6.0 / 3
    assert binding.wait_s(routable("next", 10), 5.0) == 6.0 / 2
