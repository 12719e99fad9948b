"""The fewest workers that hold the SLO: of those that do both, and of those that prefill and decode.

More workers serve a load better, up to the chance of a sample: the number is found by doubling the distance from where
a formula says it is, and then between one that holds and one that does not: in turn where a curve through what both
miss by crosses the SLO, beside that, and in the middle. For a number of prefill and decode workers the split is looked
for from the one that the formula says, one worker at a time towards the role that the SLO is missed for, as long as
that helps.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

from loadtest.plan.trial import SURELY, Fleet, Need, Trial

Try = Callable[[Fleet], Trial]
_MOST_SPLITS: Final = 4
"""Tried for one number of workers."""
_STRIDE: Final = 12
"""The first step from the formula's number is this part of it."""
_GROWN: Final = 1.5
_BETTER: Final = 0.95
"""A fleet so many times as large that still misses by more than this share of what it missed by: more is in vain."""


def fewest(miss: Callable[[int], float], *, least: int, guess: int, most: int) -> int | None:
    """The least number from `least` to `most` whose `miss` is at most 1, if it is for every larger one too.

    None: not even `most`, or larger ones do not miss by less.
    """
    missed: dict[int, float] = {}
    number = min(max(guess, least), most)
    stride = max(1, number // _STRIDE)
    while (missed.setdefault(number, miss(number))) > 1:
        if number == most or _is_in_vain(missed, number):
            return None
        number, stride = min(most, number + stride), 2 * stride
    enough, too_few = number, max(missed.keys() - {number}, default=None)
    stride = max(1, enough // _STRIDE)
    while too_few is None:  # the first one was enough
        number = max(enough - stride, least - 1)
        if number < least or missed.setdefault(number, miss(number)) > 1:
            too_few = number
        else:
            enough, stride = number, 2 * stride
    for step in itertools.count():
        if enough - too_few <= 1:
            break
        if step % 3 == 0 and too_few in missed:
            number = _crossing(too_few, enough, missed)
        elif step % 3 == 1:
            number = enough - 1 if number == enough else too_few + 1
        else:
            number = (enough + too_few) // 2
        missed[number] = miss(number)
        if missed[number] > 1:
            too_few = number
        else:
            enough = number
    return enough


def _is_in_vain(missed: dict[int, float], number: int) -> bool:
    """Of what was cut it is not known by how much it misses."""
    return any(
        number >= _GROWN * before and _BETTER * missed[before] <= missed[number] and missed[before] < SURELY
        for before in missed
    )


def _crossing(too_few: int, enough: int, missed: dict[int, float]) -> int:
    """The number between the two with which a power law through both would just hold."""
    high, low = math.log(min(missed[too_few], SURELY)), math.log(max(missed[enough], 1e-3))
    number: float = too_few * (enough / too_few) ** (high / (high - low))
    return min(max(math.ceil(number), too_few + 1), enough - 1)


def search_both(trial: Try, need: Need, most: int) -> Fleet | None:
    """The fewest workers that do both; None: not even `most`."""
    guess = math.ceil(need.both)
    number = fewest(lambda count: trial(Fleet(num_both=count)).miss, least=1, guess=guess, most=most)
    return None if number is None else Fleet(num_both=number)


def search_split(trial: Try, need: Need, most: int) -> Fleet | None:
    """The fewest workers that prefill and decode, and how many of which; None: not even `most`."""
    found: dict[int, Fleet] = {}

    def miss(count: int) -> float:
        best = best_split(trial, count, need)
        found[count] = best.fleet
        return best.miss

    guess = max(2, math.ceil(need.prefill) + math.ceil(need.decode))
    number = fewest(miss, least=2, guess=guess, most=most) if most >= 2 else None
    return None if number is None else found[number]


def best_split(trial: Try, count: int, need: Need) -> Trial:
    """The first split of `count` workers that holds, or the one that misses the least of those tried."""
    share = need.prefill / (need.prefill + need.decode) if need.prefill + need.decode else 0.5
    prefill = min(max(1, round(count * share)), count - 1)
    tried: dict[int, Trial] = {}
    while 1 <= prefill < count and prefill not in tried and len(tried) < _MOST_SPLITS:
        found = tried[prefill] = trial(Fleet(num_prefill=prefill, num_decode=count - prefill))
        if found.holds or (not found.is_cut and found.miss > min(each.miss for each in tried.values())):
            break
        if found.load >= max(found.ttft_miss, found.itl_miss):
            prefill += 1 if found.pressure.prefill > found.pressure.decode else -1
        else:
            prefill += 1 if found.ttft_miss > found.itl_miss else -1
    return min(tried.values(), key=lambda each: each.distance)


def cheapest(trials: Sequence[Trial]) -> Trial | None:
    """Fewest workers that hold; of equally many those with the most room to the SLO."""
    holding = [trial for trial in trials if trial.holds]
    return min(holding, key=lambda trial: (trial.fleet.workers, trial.miss), default=None)
