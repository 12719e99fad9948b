"""What a simulation records: requests as their clients saw them, gaps between tokens, what workers did."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from planes.wire.messages import Role, WorkerId


class Ending(StrEnum):
    """How a request ended; every request has exactly one."""

    FINISHED = "finished"
    REJECTED = "rejected"
    """No worker had begun."""
    FAILED = "failed"
    """A worker had begun, and none could finish."""
    UNFINISHED = "unfinished"


@dataclass(slots=True)
class Record:
    """What became of one request, as its client saw it. Instants count from the start of the run."""

    sent_at: float
    prompt_tokens: int
    completion_tokens: int
    """Asked for, and given unless the request did not finish."""
    ending: Ending | None = None
    code: str = ""
    """Of the error that ended it; `ok` without."""
    held_s: float = 0.0
    """In the gateway's queue, before its first attempt."""
    predicted_ttft_s: float | None = None
    cached_tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None
    num_received: int = 0
    """Tokens that its client got."""
    handover_blocks: int = 0
    is_handed_over: bool = False
    num_preemptions: int = 0
    num_retries: int = 0
    """Legs that failed before the client had a token …"""
    num_migrations: int = 0
    """… and after."""
    stall_s: float = 0.0
    """Longest pause between two tokens over which it migrated; 0 if it never did."""
    recomputed_tokens: int = 0
    """Input tokens that attempts after the first had to compute."""
    token_at: float | None = None
    """Instant of its last token so far, at the worker that made it."""
    tenant: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.sent_at

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between its tokens; None with fewer than two."""
        if self.first_at is None or self.last_at is None or self.completion_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.completion_tokens - 1)


class Gaps:
    """Seconds between tokens, of all requests together: a histogram with bins 1 % wide."""

    _LEAST_S, _STEP = 1e-6, math.log(1.01)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, gap_s: float, times: int = 1) -> None:
        self._counts[int(math.log(max(gap_s, self._LEAST_S) / self._LEAST_S) / self._STEP)] += times

    def add_between(self, instants: Sequence[float], times: int) -> None:
        """The gaps between neighbours, each `times` times."""
        if len(instants) < 8:  # not worth an array
            for sooner, later in itertools.pairwise(instants):
                self.add(later - sooner, times)
            return
        gaps = np.maximum(np.diff(instants), self._LEAST_S)
        bins, counts = np.unique((np.log(gaps / self._LEAST_S) / self._STEP).astype(np.int64), return_counts=True)
        for bin_, count in zip(bins.tolist(), counts.tolist(), strict=True):
            self._counts[bin_] += count * times

    def quantile(self, q: float) -> float | None:
        """Upper edge of the bin in which the quantile lies; None if there are no gaps."""
        wanted, seen = q * self._counts.total(), 0
        for bin_, count in sorted(self._counts.items()):
            seen += count
            if seen >= wanted:
                return self._LEAST_S * math.exp((bin_ + 1) * self._STEP)
        return None


@dataclass(slots=True)
class WorkerTotals:
    """What one worker did in a run, all its lives together."""

    worker: WorkerId
    role: Role
    busy_s: float = 0.0
    prompts: int = 0
    sent_bytes: int = 0
    num_kills: int = 0
    num_refused: int = 0
    """Legs that it had no room for."""
    num_expired: int = 0
    """KV caches that nobody fetched within their lease."""


@dataclass(frozen=True, slots=True)
class Result:
    """Everything a run gave; `report.summarise` makes a row of it."""

    records: list[Record]
    gaps: Gaps
    workers: list[WorkerTotals]
    duration_s: float
