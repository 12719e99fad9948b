"""The load that a plan is made for: the busiest part of a trace, or requests of given rate and lengths."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from loadtest.workloads import Session, Turn, Workload, lognormal, poisson, segment_names

_SIGMA: Final = 0.5
"""Of lengths about their mean: p99 is 2.8 times as long."""
_MOST: Final = 4  # times the mean


def generated(
    rate: float, prompt_tokens: int, answer_tokens: int, *, block_size: int, num_requests: int, seed: int
) -> Workload:
    """Poisson arrivals, lognormal lengths with these means, at most four times as long, nothing shared."""
    rng = random.Random(seed)
    starts = itertools.islice(poisson(rng, math.inf, lambda _: rate, rate), num_requests)
    sessions = tuple(
        Session(at, (_turn(number, _length(prompt_tokens, rng), _length(answer_tokens, rng), block_size),))
        for number, at in enumerate(starts)
    )
    return Workload(f"{rate:g} requests/s, {prompt_tokens} tokens in, {answer_tokens} out", block_size, sessions)


def _length(mean: int, rng: random.Random) -> int:
    return mean if mean == 1 else lognormal(rng, mean * math.exp(-(_SIGMA**2) / 2), _SIGMA, _MOST * mean)


def _turn(number: int, prompt_tokens: int, answer_tokens: int, block_size: int) -> Turn:
    return Turn(0.0, prompt_tokens, answer_tokens, segment_names([(number, prompt_tokens)], block_size))


def busiest(workload: Workload, num_sessions: int) -> Workload:
    """Those `num_sessions` sessions in a row that bring the most tokens a second; from second 0 on."""
    sessions = workload.sessions
    if len(sessions) <= num_sessions:
        return workload
    candidates = range(0, len(sessions) - num_sessions + 1, max(1, num_sessions // 4))
    first = max(candidates, key=_busy(sessions, num_sessions))
    start_s = sessions[first].start_s
    kept = (replace(each, start_s=each.start_s - start_s) for each in sessions[first : first + num_sessions])
    return replace(workload, sessions=tuple(kept))


def _busy(sessions: Sequence[Session], width: int) -> Callable[[int], float]:
    totals = [0, *itertools.accumulate(_tokens(session) for session in sessions)]

    def tokens_per_s(first: int) -> float:
        span_s = sessions[first + width - 1].start_s - sessions[first].start_s
        return (totals[first + width] - totals[first]) / span_s if span_s else math.inf

    return tokens_per_s


def _tokens(session: Session) -> int:
    return sum(turn.prompt_tokens + turn.completion_tokens for turn in session.turns)


def requests_per_s(workload: Workload) -> float:
    """Mean rate while sessions start; 0 for one session."""
    span_s = workload.sessions[-1].start_s - workload.sessions[0].start_s
    return workload.num_requests / span_s if span_s else 0.0
