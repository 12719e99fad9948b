import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planes.wire.messages import RequestId
from router.queue import Queue
from router.request import Explanation, RoutableRequest
from router.settings import RouterSettings


def request(name, *, priority=0, tenant="", deadline=1e9, tokens=100, slo=None):
    return RoutableRequest(
        request=RequestId(name),
        model="m",
        blocks=np.empty(0, dtype=np.uint64),
        prompt_tokens=tokens,
        expected_tokens=10,
        deadline=deadline,
        priority=priority,
        tenant=tenant,
        slo_ttft_s=slo,
    )


def add(queue, name, *, now=0.0, seconds=1.0, tokens=100, **fields):
    routable = request(name, tokens=tokens, **fields)
    return queue.add(routable, tokens, seconds, Explanation(routable.request, "", tokens, now), now=now)


def order(queue):
    return [waiting.request.request for waiting in queue.walk()]


def test_shorter_prefills_go_first_and_waiting_makes_up_for_length():
    queue = Queue(RouterSettings(aging=0.1))
    add(queue, "long", now=0.0, seconds=3.0)
    add(queue, "short", now=10.0, seconds=1.0)
    add(queue, "late", now=25.0, seconds=1.0)
    assert order(queue) == ["short", "long", "late"]


def test_whoever_is_due_first_goes_first_and_without_an_slo_it_is_due_when_it_would_be_promoted():
    queue = Queue(RouterSettings(promote_after_s=30.0))
    add(queue, "patient", now=0.0, slo=60.0)
    add(queue, "plain", now=1.0)
    add(queue, "plain too", now=2.0)
    add(queue, "hurried", now=3.0, slo=5.0)
    add(queue, "between", now=4.0, slo=27.5)
    assert order(queue) == ["hurried", "plain", "between", "plain too", "patient"]


def test_without_slos_the_order_is_that_of_arrival_and_length_whenever_it_is_asked_for():
    queue = Queue(RouterSettings(aging=0.1))
    add(queue, "long", now=0.0, seconds=3.0)
    add(queue, "short", now=10.0, seconds=1.0)
    add(queue, "late", now=25.0, seconds=1.0)
    queue.let_go(now=1e6)
    assert order(queue) == ["short", "long", "late"]


def test_a_request_that_can_no_longer_be_in_time_makes_way_until_it_is_its_turn():
    queue = Queue(RouterSettings(late_s=60.0))
    add(queue, "tight", now=0.0, slo=3.0)
    add(queue, "wide", now=0.0, slo=50.0)
    queue.let_go(now=1.9)
    assert order(queue) == ["tight", "wide"]
    assert queue.work_before_s(request("new", slo=20.0), 1.0, 1.9) == 1.0
    queue.let_go(now=2.0)  # its prefill takes a second, and it is due at 3
    assert order(queue) == ["wide", "tight"]
    assert queue.work_before_s(request("new", slo=20.0), 1.0, 2.0) == 0.0
    add(queue, "before", now=12.9, slo=50.0)
    add(queue, "after", now=13.1, slo=50.0)
    queue.let_go(now=40.0)  # nobody is given up twice
    assert order(queue) == ["wide", "before", "tight", "after"]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["slo", "plain", "update", "late", "leave"]))))
def test_those_that_can_be_in_time_are_counted_whatever_comes_between(happened):
    queue = Queue(RouterSettings())
    for number, (name, what) in enumerate(happened, 1):
        waiting = queue.get(RequestId(name))
        if what in {"slo", "plain"} and waiting is None:
            add(queue, name, seconds=number / 8, tokens=number, slo=5.0 if what == "slo" else None)
        elif waiting is not None and what == "update":
            queue.update(waiting, number, number / 8)
        elif waiting is not None and what == "late" and waiting.request.slo_ttft_s is not None:
            queue.make_way(waiting)
        elif waiting is not None and what == "leave":
            queue.remove(waiting)
        hoping = [each for each in queue.all() if each.request.slo_ttft_s is not None and not each.is_late]
        tokens, seconds = [sum(each.uncached_tokens for each in hoping), sum(each.prefill_s for each in hoping)]
        found = queue.hopeful()
        assert (found.num, found.num * found.uncached_tokens) == (len(hoping), pytest.approx(tokens))
        assert found.num * found.work_s == pytest.approx(seconds)


def test_for_room_to_decode_it_makes_way_as_long_as_its_answer_may_take_besides():
    queue = Queue(RouterSettings(late_s=60.0))
    routable = msgspec.structs.replace(request("r", slo=3.0), slo_itl_s=0.5, expected_tokens=40)
    waiting = queue.add(routable, 100, 1.0, Explanation(routable.request, "", 100, 0.0), now=0.0)
    assert not waiting.makes_way(2.0)
    queue.let_go(now=2.0)
    assert waiting.makes_way(2.0)
    assert waiting.makes_way(82.9)
    assert not waiting.makes_way(83.0)  # 3 s, 60 s, and 40 times half a second
    assert waiting.lets_pass(62.9)
    assert not waiting.lets_pass(63.0)
    waiting.request = msgspec.structs.replace(waiting.request, is_retry=True)
    assert not waiting.lets_pass(2.0), "its client has a part of the answer"


def test_those_that_make_way_keep_their_class_and_their_tenant_s_share():
    queue = Queue(RouterSettings(quantum_tokens=100))
    add(queue, "low", priority=1, slo=50.0)
    add(queue, "a late", tenant="a", slo=1.0)
    add(queue, "a", tenant="a", slo=50.0)
    add(queue, "b late", tenant="b", slo=1.0)
    add(queue, "b", tenant="b", slo=50.0)
    queue.let_go(now=0.0)
    assert order(queue) == ["a", "b", "a late", "b late", "low"]


def test_a_prompt_that_has_been_cached_meanwhile_can_be_in_time_for_longer():
    queue = Queue(RouterSettings())
    waiting = add(queue, "long", seconds=9.0, slo=10.0)
    add(queue, "other", seconds=1.0, slo=20.0)
    queue.update(waiting, 10, 0.5)
    queue.let_go(now=5.0)
    assert order(queue) == ["long", "other"]
    queue.let_go(now=9.5)
    assert order(queue) == ["other", "long"]


def test_other_settings_keep_those_back_that_cannot_be_in_time():
    changed, fresh = Queue(RouterSettings(late_s=60.0)), Queue(RouterSettings(late_s=5.0, promote_after_s=7.0))
    for queue in (changed, fresh):
        add(queue, "tight", now=0.0, slo=3.0)
        add(queue, "wide", now=0.0, slo=20.0)
        add(queue, "plain", now=0.0)
        queue.let_go(now=2.5)
    assert order(changed) == ["wide", "plain", "tight"]
    changed.configure(RouterSettings(late_s=60.0, aging=1.0))
    assert order(changed) == ["wide", "plain", "tight"]
    changed.configure(RouterSettings(late_s=5.0, promote_after_s=7.0))
    assert order(changed) == order(fresh) == ["plain", "tight", "wide"]
    for queue in (changed, fresh):
        queue.let_go(now=19.5)
    assert order(changed) == order(fresh) == ["plain", "tight", "wide"]


def test_class_zero_goes_first_until_a_wait_has_promoted_the_others():
    queue = Queue(RouterSettings(promote_after_s=30.0))
    add(queue, "low", now=0.0, priority=2)
    add(queue, "high", now=50.0, priority=0)
    assert order(queue) == ["high", "low"]
    queue.promote(now=59.0)
    assert queue.depths() == {0: 1, 1: 1}
    queue.promote(now=60.0)
    assert order(queue) == ["low", "high"]


def test_negative_classes_go_before_class_zero_in_their_order():
    queue = Queue(RouterSettings())
    for name, priority in {"normal": 0, "vip": -10, "low": 3, "first": -1000, "vip too": -9}.items():
        add(queue, name, priority=priority)
    assert order(queue) == ["first", "vip", "vip too", "normal", "low"]
    assert queue.depths() == {0: 1, -10: 1, 3: 1, -1000: 1, -9: 1}


def test_class_zero_does_not_starve_behind_negative_ones():
    queue = Queue(RouterSettings(promote_after_s=30.0))
    add(queue, "normal", now=0.0)
    add(queue, "vip", now=10.0, priority=-2, seconds=0.1)
    assert queue.wakeup() == 30.0
    queue.promote(now=60.0)
    assert order(queue) == ["normal", "vip"]
    add(queue, "later", now=61.0, priority=-2, seconds=0.1)
    assert order(queue) == ["normal", "vip", "later"]
    queue.promote(now=1000.0)
    assert queue.depths() == {-2: 3}  # nobody is first, so nobody rises above the first class


def test_class_zero_stays_where_it_is_while_nobody_is_before_it():
    queue = Queue(RouterSettings(promote_after_s=30.0))
    waiting = add(queue, "normal", now=0.0)
    queue.promote(now=1000.0)
    assert (waiting.level, queue.wakeup()) == (0, 1e9)


def test_other_aging_puts_those_that_wait_in_the_order_it_stands_for():
    day = 86_400.0
    changed, fresh = Queue(RouterSettings(aging=4.0)), Queue(RouterSettings(aging=0.1))
    for queue in (changed, fresh):
        for number in range(100):
            add(queue, f"r{number}", now=day + number / 10, seconds=(number * 37 % 100) / 10)
    changed.configure(RouterSettings(aging=0.1))
    for queue in (changed, fresh):
        add(queue, "new", now=day + 20.0, seconds=5.0)
    assert order(changed) == order(fresh)
    changed.configure(RouterSettings(aging=4.0))
    assert order(changed)[-1] == "new"


def test_another_quantum_makes_no_tenant_pay_again_for_what_it_has_had():
    queue = Queue(RouterSettings(quantum_tokens=1000))
    for number in range(60):
        add(queue, f"a{number}", tenant="a", tokens=1000)
        add(queue, f"b{number}", tenant="b", tokens=1000, now=1.0)
    for _ in range(20):
        queue.serve(next(each for each in queue.walk() if each.request.tenant == "a"))
    queue.configure(RouterSettings(quantum_tokens=10))
    first = [name[0] for name in order(queue)[:20]]
    assert first.count("a") == 10  # b may go first with what it has saved of eight smaller rounds; a owes nothing


def test_another_time_of_promotion_counts_from_when_a_request_came():
    queue = Queue(RouterSettings(promote_after_s=1000.0))
    add(queue, "low", now=0.0, priority=1)
    queue.configure(RouterSettings(promote_after_s=30.0))
    assert queue.wakeup() == 30.0
    queue.promote(now=30.0)
    assert queue.depths() == {0: 1}


def test_a_tenant_whose_requests_wait_for_one_worker_saves_up_eight_rounds_and_no_more():
    queue = Queue(RouterSettings(quantum_tokens=1000))
    for number in range(60):
        add(queue, f"a{number}", tenant="a", tokens=1000)
    waiting = [add(queue, f"b{number}", tenant="b", tokens=1000, now=1.0, seconds=1.0) for number in range(30)]
    for _ in range(40):  # b's wait for their worker: a's go past them
        queue.serve(next(each for each in queue.walk() if each.request.tenant == "a"))
    assert len(waiting) == 30
    assert [name[0] for name in order(queue)[:10]].count("b") == 9  # eight saved rounds, and this one's


def test_a_tenant_that_floods_the_queue_does_not_hold_up_another():
    queue = Queue(RouterSettings(quantum_tokens=1000))
    for k in range(100):
        add(queue, f"flood{k}", tenant="a", tokens=500)
    for k in range(4):
        add(queue, f"few{k}", now=1.0, tenant="b", tokens=500)
    first = order(queue)[:8]
    assert sum(name.startswith("few") for name in first) == 4


def test_shares_are_counted_in_uncached_tokens():
    queue = Queue(RouterSettings(quantum_tokens=1000))
    for k in range(200):
        add(queue, f"big{k}", tenant="a", tokens=2000)
        add(queue, f"small{k}", tenant="b", tokens=200)
    tokens = {"a": 0, "b": 0}
    for _ in range(110):
        waiting = next(queue.walk())
        tokens[waiting.request.tenant] += waiting.uncached_tokens
        queue.serve(waiting)
    assert abs(tokens["a"] - tokens["b"]) <= 4000


def test_an_idle_tenant_saves_nothing():
    queue = Queue(RouterSettings(quantum_tokens=1000))
    add(queue, "early", tenant="b", tokens=100)
    queue.serve(next(queue.walk()))
    for k in range(50):
        add(queue, f"a{k}", tenant="a", tokens=1000)
    for _ in range(20):
        queue.serve(next(queue.walk()))
    for k in range(50):
        add(queue, f"b{k}", tenant="b", tokens=1000, now=1.0)
    assert sum(name.startswith("b") for name in order(queue)[:10]) <= 6


def test_a_new_estimate_changes_the_place():
    queue = Queue(RouterSettings())
    first = add(queue, "first", seconds=1.0)
    add(queue, "second", seconds=2.0)
    queue.update(first, 900, 3.0)
    assert order(queue) == ["second", "first"]
    assert first.uncached_tokens == 900


def test_expired_requests_are_told_once_and_stay_until_removed():
    queue = Queue(RouterSettings())
    waiting = add(queue, "x", deadline=5.0)
    assert queue.wakeup() == 5.0
    assert queue.expired(4.9) == []
    assert queue.expired(5.0) == [waiting]
    queue.remove(waiting)
    assert queue.expired(9.0) == []
    assert len(queue) == 0


def test_work_before_counts_what_would_be_served_sooner():
    queue = Queue(RouterSettings(aging=0.1))
    add(queue, "short", seconds=1.0)
    add(queue, "long", seconds=9.0)
    add(queue, "low", seconds=1.0, priority=3)
    assert queue.work_before_s(request("new"), 2.0, 0.0) == 1.0
    assert queue.work_before_s(request("new", priority=5), 2.0, 0.0) == 11.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "serve", "remove", "update", "promote", "let_go", "configure"]),
            st.integers(-3, 3),
            st.sampled_from(["a", "b", "c"]),
            st.integers(1, 9000),
            st.integers(0, 30),
        ),
        max_size=60,
    )
)
def test_every_request_is_in_the_walk_exactly_once_whatever_happens(history):
    queue, now, present = Queue(RouterSettings()), 0.0, {}
    for number, (what, priority, tenant, tokens, place) in enumerate(history):
        now += 3.0
        some = list(present.values())[place % len(present)] if present else None
        if what == "add":
            name = f"r{number}"
            slo = None if place % 2 else float(place)
            present[name] = add(queue, name, now=now, priority=priority, tenant=tenant, tokens=tokens, slo=slo)
        elif what == "let_go":
            queue.let_go(now)
        elif what == "promote":
            queue.promote(now)
        elif what == "configure":
            queue.configure(RouterSettings(aging=1 + place / 10, quantum_tokens=tokens, promote_after_s=1.0 + place))
        elif some is not None and what == "update":
            queue.update(some, tokens, tokens / 1000)
        elif some is not None:
            (queue.serve if what == "serve" else queue.remove)(some)
            del present[some.request.request]
        assert sorted(order(queue)) == sorted(present)
        assert sum(queue.depths().values()) == len(queue) == len(present)
    for waiting in list(present.values()):
        queue.remove(waiting)
    assert order(queue) == []
    assert queue.depths() == {}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3), st.sampled_from([1, 100, 20_000]))
def test_nobody_starves_while_others_keep_coming(seed, priority, tokens):
    rng = random.Random(seed)
    queue, now = Queue(RouterSettings(promote_after_s=5.0, aging=0.1)), 0.0
    victim = add(queue, "victim", priority=priority, tenant="v", tokens=tokens, seconds=tokens / 8000)
    for number in range(3000):
        now += 0.1
        add(queue, f"r{number}", now=now, tenant=rng.choice("ab"), tokens=rng.randint(1, 4000), seconds=0.01)
        queue.promote(now)
        served = next(queue.walk())
        queue.serve(served)
        if served is victim:
            return
    raise AssertionError("the victim is still waiting")
