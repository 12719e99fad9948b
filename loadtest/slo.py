"""What an answer must keep to count as good."""

import statistics
from collections.abc import Sequence

import msgspec


class Slo(msgspec.Struct, frozen=True):
    """Seconds: to the first token, and between tokens on average."""

    ttft_s: float = 5.0
    tpot_s: float = 0.05

    def is_held(self, ttft_s: float, tpot_s: float) -> bool:
        return ttft_s <= self.ttft_s and tpot_s <= self.tpot_s


def mean_gap_s(gaps_s: Sequence[float]) -> float:
    """Between the tokens of one answer; 0 of one with a single token."""
    return statistics.fmean(gaps_s) if gaps_s else 0.0
