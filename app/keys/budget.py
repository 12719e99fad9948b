"""What is left of a key's limits: the part that one gateway holds, and the part that none has taken yet.

For each account etcd has one entry: how much of this minute's and this day's budget gateways have taken. A gateway
takes a slice ahead, and lets requests in on that alone. A slice is an eighth of what is left, so that slices shrink
until each is one request. What is taken and not used is given back; a gateway that dies has lost its slice for the
window.

    etcd:    limit = taken by gateways                           + left
    gateway: taken = used by requests + reserved by some that run + in hand

Windows are a minute and a day of UTC, numbered from 1970, by each gateway's clock. Sequences at once are no window: a
gateway holds slots, and says from time to time that it does.

Pure: nothing here waits or knows the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from app.keys.tenant import Limits

MINUTE_S, DAY_S = 60, 86_400
SECONDS: Final = (MINUTE_S, DAY_S, MINUTE_S, DAY_S)
NAMES: Final = ("requests per minute", "requests per day", "tokens per minute", "tokens per day")
_SHARE: Final = 8
SLOTS_KEPT_S: Final = 15.0
"""So long slots are a gateway's that says nothing more."""

Amounts = tuple[int, int, int, int]
"""In the order of `NAMES`."""
NOTHING: Final[Amounts] = (0, 0, 0, 0)


class Slots(msgspec.Struct, frozen=True, array_like=True):
    """Of one gateway. told_at: seconds since 1970."""

    num: int
    told_at: float


class Budget(msgspec.Struct, frozen=True, omit_defaults=True):
    """As etcd has it. minute, day: numbers of the windows that `taken` is of."""

    minute: int = 0
    day: int = 0
    taken: Amounts = NOTHING
    slots: dict[str, Slots] = {}
    last: str = ""
    """Name of the change that made it so: whoever made it and got no answer finds out that it was made."""

    def at(self, now: float) -> "Budget":
        """In the window of `now`, unless another gateway's clock has come further."""
        minute, day = max(self.minute, int(now // MINUTE_S)), max(self.day, int(now // DAY_S))
        if (minute, day) == (self.minute, self.day):
            return self
        is_same = (minute == self.minute, day == self.day) * 2
        taken = _amounts([each if same else 0 for each, same in zip(self.taken, is_same, strict=True)])
        return msgspec.structs.replace(self, minute=minute, day=day, taken=taken)


@dataclass(slots=True, eq=False)
class Need:
    """Of one request.  slots: its sequences.  windows: minute and day in which it got them."""

    amounts: Amounts
    slots: int
    windows: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a need cannot be met. dimension: of `NAMES`; None: sequences at once.  resets_in_s: until there is more."""

    dimension: int | None
    left: int
    limit: int
    resets_in_s: float


@dataclass(frozen=True, slots=True)
class Taking:
    """What a gateway would take for some needs. budget: what etcd would have then.  told: what was owed, in it.

    shortages: of each need; None: it is met.
    """

    budget: Budget
    amounts: Amounts
    slots: int
    told: Amounts
    shortages: list[Shortage | None]


@dataclass(slots=True)
class Share:
    """One account in one gateway."""

    gateway: str
    limits: Limits
    max_slots: int | None
    budget: Budget = field(default_factory=Budget)
    """As etcd had it when it was asked last; `in_hand`, `owed` and `spent` are of its windows."""
    in_hand: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Less than 0: used without having been taken."""
    owed: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Taken behind etcd's back; less than 0: to be given back."""
    spent: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Reserved since `put_aside` was called last."""
    slots_held: int = 0
    slots_used: int = 0
    slots_peak: int = 0
    """Most used at once since then."""

    @property
    def limit(self) -> tuple[int | None, int | None, int | None, int | None]:
        each = self.limits
        return each.requests_per_minute, each.requests_per_day, each.tokens_per_minute, each.tokens_per_day

    def advance(self, now: float) -> None:
        """What belongs to a window that is over is worth nothing."""
        self._take_over(self.budget.at(now))

    def reserve(self, need: Need, now: float) -> bool:
        """Take it from what is in hand, if that suffices."""
        self.advance(now)
        if self.max_slots is not None and self.slots_used + need.slots > self.slots_held:
            return False
        limits = self.limit
        if any(limits[at] is not None and need.amounts[at] > self.in_hand[at] for at in range(4)):
            return False
        self.use(need)
        return True

    def use(self, need: Need) -> None:
        """A request has it now, whether it is in hand or not."""
        for at, limit in enumerate(self.limit):
            if limit is not None:
                self.in_hand[at] -= need.amounts[at]
                self.spent[at] += need.amounts[at]
        self.slots_used += need.slots
        self.slots_peak = max(self.slots_peak, self.slots_used)
        need.windows = self.budget.minute, self.budget.day

    def give_back(self, amounts: Amounts, need: Need) -> None:
        """What a request had reserved and not used; less than 0: what it used beyond that."""
        for at, is_same in enumerate(_are_same(need.windows, self.budget)):
            if is_same and self.limit[at] is not None:
                self.in_hand[at] += amounts[at]

    def is_low(self) -> bool:
        """Whether less than half a slice is in hand, of anything of which a whole one could be had."""
        slices = [self._slice(at) for at in range(4)]
        return any(each > 1 and 2 * has < each for each, has in zip(slices, self.in_hand, strict=True))

    def left(self, at: int) -> int:
        """Of one limit, as far as this gateway knows."""
        limit = self.limit[at]
        return 0 if limit is None else max(0, limit - self.budget.taken[at] - self.owed[at] + self.in_hand[at])

    def put_aside(self, *, is_last: bool = False) -> bool:
        """Owe all gateways what is in hand and not used at this rate.  Returns:  whether etcd should be told.

        is_last: everything.
        """
        for at, limit in enumerate(self.limit):
            has, kept = self.in_hand[at], max(self._slice(at), self.spent[at])
            if limit is not None and (is_last or has < 0 or self.spent[at] == 0):
                kept = 0
            if limit is not None and (has < 0 or has > kept):
                self.in_hand[at] = kept
                self.owed[at] -= has - kept
        self.spent = [0, 0, 0, 0]
        slots, self.slots_peak = self.slots_peak, self.slots_used
        is_freed = self.slots_held > slots
        self.slots_held = min(self.slots_held, slots)
        return is_freed or any(self.owed)

    def take(
        self, budget: Budget, needs: Sequence[Need], now: float, *, has_slice: bool = True, change: str = ""
    ) -> Taking:
        """What to take for these needs and as a slice beside, from `budget`, as etcd has it. Changes nothing.

        change: a name that no other one has, nor will have.
        """
        budget = budget.at(now)
        is_same = _are_same((self.budget.minute, self.budget.day), budget)
        owed = [each if same else 0 for each, same in zip(self.owed, is_same, strict=True)]
        in_hand = [each if same else 0 for each, same in zip(self.in_hand, is_same, strict=True)]
        budget = msgspec.structs.replace(budget, taken=_sum(budget.taken, owed))
        left = [0 if limit is None else limit - taken for limit, taken in zip(self.limit, budget.taken, strict=True)]
        others = self._others(budget, now)
        slots_left = 0
        if self.max_slots is not None:
            slots_left = self.max_slots - self.slots_held - sum(each.num for each in others.values())
        free, slots, taken = self.slots_held - self.slots_used, 0, [0, 0, 0, 0]
        shortages = list[Shortage | None]()
        for need in needs:
            lacks = [max(0, amount - has) for amount, has in zip(need.amounts, in_hand, strict=True)]
            slots_lack = max(0, need.slots - free)
            shortage = self._shortage(lacks, left, in_hand, now) or self._slots_shortage(slots_lack, slots_left - slots)
            shortages.append(shortage)
            if shortage is None:
                for at, limit in enumerate(self.limit):
                    if limit is not None:
                        left[at] -= lacks[at]
                        taken[at] += lacks[at]
                        in_hand[at] += lacks[at] - need.amounts[at]
                free += slots_lack - need.slots
                slots += slots_lack
        if has_slice:
            for at in range(4):
                taken[at] += max(0, left[at] // _SHARE - in_hand[at]) if left[at] // _SHARE > 1 else 0
            slots += max(0, (slots_left - slots) // _SHARE - free)
        held = self.slots_held + slots
        own = {self.gateway: Slots(held, now)} if self.max_slots is not None and held > 0 else {}
        after = msgspec.structs.replace(budget, taken=_sum(budget.taken, taken), slots=others | own, last=change)
        return Taking(after, _amounts(taken), slots, _amounts(owed), shortages)

    def took(self, taking: Taking, *, is_told: bool = True) -> None:
        """etcd has it so now; or it is away (`is_told` false), and shall hear of it."""
        if is_told:
            self._take_over(taking.budget)
            for at, told in enumerate(taking.told):
                self.owed[at] -= told
        for at, amount in enumerate(taking.amounts):
            self.in_hand[at] += amount
            if not is_told:
                self.owed[at] += amount
        self.slots_held += taking.slots

    def took_unanswered(self, taking: Taking) -> None:
        """etcd has had it since, and nobody here: it goes back, as those that it was for have been decided on alone.

        What was of a window that is over by now is worth nothing, and slots are told anew with each change.
        """
        for at, is_same in enumerate(_are_same((self.budget.minute, self.budget.day), taking.budget)):
            if is_same:
                self.owed[at] -= taking.told[at] + taking.amounts[at]

    def _take_over(self, budget: Budget) -> None:
        if budget is self.budget:
            return
        for at, is_same in enumerate(_are_same((self.budget.minute, self.budget.day), budget)):
            if not is_same:
                self.in_hand[at] = self.owed[at] = self.spent[at] = 0
        self.budget = budget

    def _slice(self, at: int) -> int:
        limit = self.limit[at]
        return 0 if limit is None else max(0, limit - self.budget.taken[at]) // _SHARE

    def _shortage(
        self, lacks: Sequence[int], left: Sequence[int], in_hand: Sequence[int], now: float
    ) -> Shortage | None:
        """The one that lasts longest."""
        found = [
            Shortage(at, max(0, left[at]) + max(0, in_hand[at]), limit, SECONDS[at] - now % SECONDS[at])
            for at, limit in enumerate(self.limit)
            if limit is not None and lacks[at] > max(0, left[at])
        ]
        return max(found, key=lambda each: each.resets_in_s, default=None)

    def _slots_shortage(self, lack: int, left: int) -> Shortage | None:
        if self.max_slots is None or lack <= max(0, left):
            return None
        return Shortage(None, max(0, left), self.max_slots, 1.0)

    def _others(self, budget: Budget, now: float) -> dict[str, Slots]:
        """Slots of the other gateways that are alive."""
        return {
            name: each
            for name, each in budget.slots.items()
            if name != self.gateway and now - each.told_at < SLOTS_KEPT_S
        }


def needed(limits: Limits, *, prompt_tokens: int, answer_tokens: int, slots: int) -> Need:
    """Of a request: all that it may use. One that may use more than a whole window has needs the whole window."""
    tokens = prompt_tokens + answer_tokens
    per_minute, per_day = limits.tokens_per_minute, limits.tokens_per_day
    minute = tokens if per_minute is None else min(tokens, per_minute)
    day = tokens if per_day is None else min(tokens, per_day)
    return Need((1, 1, minute, day), slots)


def _are_same(windows: tuple[int, int], budget: Budget) -> tuple[bool, ...]:
    """Of each amount, whether its window is still the same."""
    return (windows[0] == budget.minute, windows[1] == budget.day) * 2


def _sum(one: Sequence[int], other: Sequence[int]) -> Amounts:
    return _amounts([max(0, a + b) for a, b in zip(one, other, strict=True)])


def _amounts(values: Sequence[int]) -> Amounts:
    requests_per_minute, requests_per_day, tokens_per_minute, tokens_per_day = values
    return requests_per_minute, requests_per_day, tokens_per_minute, tokens_per_day
