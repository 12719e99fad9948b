import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.keys.budget import Budget, Need, Share, Shortage, Slots, needed
from app.keys.tenant import Limits

NOW = 1_000_020.0
"""The first third of a minute."""


def share(gateway="a", max_slots=None, **limits):
    return Share(gateway, Limits(**limits), max_slots)


def need(tokens=0, slots=1):
    return Need((1, 1, tokens, tokens), slots)


def shortages(own, budget, *needs, now=NOW):
    """Take for these needs, and let them have it."""
    taking = own.take(budget, needs, now)
    own.took(taking)
    for each, shortage in zip(needs, taking.shortages, strict=True):
        if shortage is None:
            own.use(each)
    return taking.shortages


def test_nothing_is_in_hand_before_it_has_been_taken_and_a_slice_serves_many_after():
    own = share(tokens_per_minute=800)
    assert not own.reserve(need(10), NOW)
    assert shortages(own, Budget(), need(10)) == [None]
    assert own.budget.taken == (0, 0, 10 + 790 // 8, 0)
    served = 0
    while own.reserve(need(10), NOW):
        served += 1
    assert served == 9
    assert own.is_low()


def test_slices_shrink_to_one_request_as_the_budget_does():
    own, taken, budget = share(requests_per_minute=40), [], Budget()
    for _ in range(40):
        before = own.budget.taken[0]
        if not own.reserve(need(), NOW):
            assert shortages(own, budget, need()) == [None]
            budget = own.budget
            taken.append(budget.taken[0] - before)
    assert taken[0] == 5
    assert taken[-9:] == [1] * 9
    assert shortages(own, budget, need()) == [Shortage(0, 0, 40, 60 - NOW % 60)]


def test_what_is_short_is_told_with_what_is_left_and_until_when():
    own = share(tokens_per_day=100, requests_per_minute=1)
    assert shortages(own, Budget(), need(90), need(20), need(5)) == [
        None,
        Shortage(3, 10, 100, 86_400 - NOW % 86_400),
        Shortage(0, 0, 1, 60 - NOW % 60),
    ]


def test_a_new_window_begins_with_all_of_it():
    own = share(tokens_per_minute=100, tokens_per_day=150)
    assert shortages(own, Budget(), need(100)) == [None]
    assert shortages(own, own.budget, need(100), now=NOW + 60) == [Shortage(3, 50, 150, 86_400 - (NOW + 60) % 86_400)]
    assert shortages(own, own.budget, need(50), now=NOW + 60) == [None]
    assert (own.left(2), own.left(3)) == (50, 0)


def test_the_gateway_whose_clock_is_ahead_says_which_window_it_is():
    ahead, behind = share("a", requests_per_minute=1), share("b", requests_per_minute=1)
    assert shortages(ahead, Budget(), need(), now=NOW + 60) == [None]
    (told,) = shortages(behind, ahead.budget, need(), now=NOW)
    assert told is not None


def test_what_a_request_has_not_used_is_in_hand_again_and_what_it_used_beyond_is_owed():
    own = share(tokens_per_minute=100)
    one, other = need(60), need(40)
    assert shortages(own, Budget(), one) == [None]
    own.give_back((0, 0, 50, 0), one)
    assert own.left(2) == 90
    assert own.reserve(need(50), NOW)
    assert shortages(own, own.budget, other) == [None]
    own.give_back((0, 0, -15, 0), other)
    assert own.left(2) == 0
    assert own.put_aside()
    assert own.take(own.budget, (), NOW, has_slice=False).budget.taken[2] == 115, "used, so it counts"


def test_what_was_reserved_in_another_window_is_not_given_back_in_this_one():
    own = share(tokens_per_minute=100, tokens_per_day=1000)
    one = need(60)
    assert shortages(own, Budget(), one) == [None]
    own.advance(NOW + 60)
    own.give_back((0, 0, 50, 50), one)
    assert (own.in_hand[2], own.left(2), own.left(3)) == (0, 100, 990)


def test_what_is_not_used_is_given_back_to_all():
    own, other = share("a", tokens_per_minute=1000), share("b", tokens_per_minute=1000)
    assert shortages(own, Budget(), need(500)) == [None]
    assert own.in_hand[2] == 500 // 8
    own.put_aside()
    assert own.in_hand[2] == 500 // 8, "used just now: it will need some"
    assert own.put_aside()
    taking = own.take(own.budget, (), NOW, has_slice=False)
    own.took(taking)
    assert (taking.budget.taken[2], own.owed[2]) == (500, 0)
    assert shortages(other, own.budget, need(500)) == [None]


def test_without_etcd_a_gateway_counts_alone_and_tells_later():
    own = share(tokens_per_minute=100)
    own.advance(NOW)
    alone = own.take(own.budget, [need(90), need(20)], NOW)
    assert [each is None for each in alone.shortages] == [True, False]
    own.took(alone, is_told=False)
    own.use(need(90))
    assert own.left(2) == 10
    back = own.take(Budget(minute=int(NOW // 60), day=int(NOW // 86_400), taken=(0, 0, 30, 0)), [], NOW)
    assert back.budget.taken[2] >= 120
    own.took(back)
    assert (own.left(2), own.owed[2]) == (0, 0)


def test_sequences_at_once_are_counted_over_gateways_and_given_back():
    one, other = share("a", 3), share("b", 3)
    assert shortages(one, Budget(), need(slots=2)) == [None]
    assert shortages(other, one.budget, need(slots=2)) == [Shortage(None, 1, 3, 1.0)]
    assert shortages(other, one.budget, need(slots=1)) == [None]
    one.slots_used -= 2
    one.put_aside()
    assert one.put_aside()
    one.took(one.take(other.budget, (), NOW, has_slice=False))
    assert set(one.budget.slots) == {"b"}
    assert shortages(other, one.budget, need(slots=2)) == [None]


def test_slots_of_a_gateway_that_says_nothing_more_are_free():
    dead = Budget(slots={"dead": Slots(3, NOW - 15)})
    assert shortages(share("b", 3), dead, need(slots=3)) == [None]
    alive = Budget(slots={"alive": Slots(3, NOW - 14)})
    assert shortages(share("b", 3), alive, need(slots=1)) == [Shortage(None, 0, 3, 1.0)]


@pytest.mark.parametrize(
    ("limits", "amounts"),
    [
        (Limits(), (1, 1, 150, 150)),
        (Limits(tokens_per_minute=120), (1, 1, 120, 150)),
        (Limits(tokens_per_minute=1000, tokens_per_day=140), (1, 1, 150, 140)),
    ],
)
def test_a_request_that_may_use_more_than_a_window_has_needs_the_whole_window(limits, amounts):
    assert needed(limits, prompt_tokens=50, answer_tokens=100, slots=1).amounts == amounts


class Fleet:
    """Gateways over one entry, in which each change is atomic, as etcd's transactions make it."""

    def __init__(self, limits):
        self.limits = limits
        self.shares = [Share(str(n), limits, None) for n in range(3)]
        self.budget, self.now = Budget(), NOW
        self.running, self.used, self.num_requests, self.lost = [], {}, 0, 0

    def tell(self, own, *needs, has_slice=True):
        taking = own.take(self.budget, needs, self.now, has_slice=has_slice)
        self.budget = taking.budget
        own.took(taking)
        return taking.shortages

    def ask(self, who, amount):
        own = self.shares[who]
        one = needed(self.limits, prompt_tokens=amount, answer_tokens=0, slots=1)
        if not own.reserve(one, self.now):
            if self.tell(own, one) != [None]:
                return
            own.use(one)
        self.running.append((own, one))
        self.used[one.windows[0]] = self.used.get(one.windows[0], 0) + one.amounts[2]
        self.num_requests += 1

    def end(self, _, amount):
        if self.running:
            own, one = self.running.pop(amount % len(self.running))
            back = min(amount, one.amounts[2])
            own.give_back((0, 0, back, 0), one)
            self.used[one.windows[0]] -= back

    def tick(self, who, _):
        if self.shares[who].put_aside():
            self.tell(self.shares[who], has_slice=False)

    def die(self, who, amount):
        own = self.shares[who]
        self.lost += own.in_hand[1] - own.owed[1]
        self.running = [(other, one) for other, one in self.running if other is not own]
        self.shares[who] = Share(f"{who}.{amount}", self.limits, None)

    def later(self, _, amount):
        self.now += amount / 4


@given(
    st.integers(1, 400),
    st.integers(1, 60),
    st.lists(
        st.tuples(st.sampled_from(["ask", "end", "tick", "die", "later"]), st.integers(0, 2), st.integers(0, 120)),
        max_size=80,
    ),
)
def test_whatever_happens_no_window_gives_more_than_its_limit(tokens, requests, steps):
    """And nothing is lost but what dead gateways had in hand."""
    fleet = Fleet(Limits(tokens_per_minute=tokens, requests_per_day=requests))
    for what, who, amount in steps:
        getattr(fleet, what)(who, amount)
        assert all(spent <= tokens for spent in fleet.used.values())
        assert fleet.num_requests <= requests
    for own in fleet.shares:
        own.advance(fleet.now)
        own.put_aside(is_last=True)
        fleet.tell(own, has_slice=False)
    assert fleet.budget.taken[1] == fleet.num_requests + fleet.lost
