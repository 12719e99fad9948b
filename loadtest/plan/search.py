"""The fewest workers that hold the SLO: of those that do both, and of those that prefill and decode.

More workers serve a load better, up to the chance of a sample: the number is found by doubling the distance from where
a formula says it is, then by bisection. For a number of prefill and decode workers the split is looked for from the one
that the formula says, one worker at a time towards the role that the SLO is missed for, as long as that helps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final

from loadtest.plan.trial import Fleet, Need, Trial

Try = Callable[[Fleet], Trial]
_MOST_SPLITS: Final = 4
"""Tried for one number of workers."""
_GROWN: Final = 1.5
_BETTER: Final = 0.95
"""A fleet so many times as large that still misses by more than this share of what it missed by: more is in vain."""


def fewest(miss: Callable[[int], float], *, least: int, guess: int, most: int) -> int | None:
    """The least number from `least` to `most` whose `miss` is at most 1, if it is for every larger one too.

    None: not even `most`, or larger ones do not miss by less.
    """
    missed: dict[int, float] = {}
    number = min(max(guess, least), most)
    stride = max(1, number // 6)
    while (missed.setdefault(number, miss(number))) > 1:
        if number == most or _is_in_vain(missed, number):
            return None
        number, stride = min(most, number + stride), 2 * stride
    enough, too_few = number, max(missed.keys() - {number}, default=None)
    stride = max(1, enough // 6)
    while too_few is None:  # the first one was enough
        number = max(enough - stride, least - 1)
        if number < least or miss(number) > 1:
            too_few = number
        else:
            enough, stride = number, 2 * stride
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if miss(middle) > 1:
            too_few = middle
        else:
            enough = middle
    return enough


def _is_in_vain(missed: dict[int, float], number: int) -> bool:
    return any(number >= _GROWN * before and missed[number] >= _BETTER * missed[before] for before in missed)


def search_both(trial: Try, need: Need, most: int) -> Fleet | None:
    """The fewest workers that do both; None: not even `most`."""
    guess = math.ceil(need.prefill + need.decode)
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
        if found.holds or found.miss > min(each.miss for each in tried.values()):
            break
        if found.load >= max(found.ttft_miss, found.itl_miss):
            prefill += 1 if found.pressure.prefill > found.pressure.decode else -1
        else:
            prefill += 1 if found.ttft_miss > found.itl_miss else -1
    return min(tried.values(), key=lambda each: each.miss)


def cheapest(trials: Sequence[Trial]) -> Trial | None:
    """Fewest workers that hold; of equally many those with the most room to the SLO."""
    holding = [trial for trial in trials if trial.holds]
    return min(holding, key=lambda trial: (trial.fleet.workers, trial.miss), default=None)
