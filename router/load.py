"""What a gateway's requests ask for, added up per model since its start; two readings make a window's load."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from router.request import Observed, Outcome, RoutableRequest

_FINISHED: Final = Outcome.FINISHED  # bound once, see CONTRIBUTING.md
_MAX_MODELS = 1024  # further ones are not counted

_Sum = Annotated[float, Meta(ge=0, le=1e18)]


class ModelLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the requests for one model. Gateways tell each other theirs as JSON (`planes/election.py`)."""

    arrived: _Sum = 0.0
    """Requests, whatever became of them …"""
    arrived_tokens: _Sum = 0.0
    """… and their prompt tokens."""
    ended: _Sum = 0.0
    """Answers that came to their end …"""
    prompt_tokens: _Sum = 0.0
    uncached_tokens: _Sum = 0.0
    pairs: _Sum = 0.0
    """… and of their prompts: tokens, those that had to be computed, and uncached * (prompt - uncached / 2) tokens."""
    streams: _Sum = 0.0
    """Those of them with two tokens or more …"""
    stream_tokens: _Sum = 0.0
    stream_kv_tokens: _Sum = 0.0
    stream_s: _Sum = 0.0
    """… and of these: tokens after the first, the same times their context, and seconds from the first to the last."""
    judged: _Sum = 0.0
    good: _Sum = 0.0
    """Requests with an SLO that ended or were refused, and those within it."""
    with_itl: _Sum = 0.0
    slo_itl_s: _Sum = 0.0
    """Arrivals with an SLO for the time between tokens, and the sum of these."""

    @property
    def attainment(self) -> float | None:
        """Share within the SLO; None: nobody asked for one."""
        return self.good / self.judged if self.judged else None


def since(now: Mapping[str, ModelLoad], before: Mapping[str, ModelLoad]) -> dict[str, ModelLoad]:
    """What has come between two readings."""
    none = ModelLoad()
    return {model: _each(load, before.get(model, none), sign=-1) for model, load in now.items()}


def together(loads: Iterable[Mapping[str, ModelLoad]]) -> dict[str, ModelLoad]:
    """Of several gateways."""
    total: dict[str, ModelLoad] = {}
    for each in loads:
        for model, load in each.items():
            total[model] = _each(total[model], load) if model in total else load
    return total


def _each(one: ModelLoad, other: ModelLoad, sign: int = 1) -> ModelLoad:
    names = ModelLoad.__struct_fields__
    return ModelLoad(**{name: max(0.0, getattr(one, name) + sign * getattr(other, name)) for name in names})


@dataclass(slots=True)
class _Sums:
    """`ModelLoad` while it grows."""

    arrived: float = 0.0
    arrived_tokens: float = 0.0
    ended: float = 0.0
    prompt_tokens: float = 0.0
    uncached_tokens: float = 0.0
    pairs: float = 0.0
    streams: float = 0.0
    stream_tokens: float = 0.0
    stream_kv_tokens: float = 0.0
    stream_s: float = 0.0
    judged: float = 0.0
    good: float = 0.0
    with_itl: float = 0.0
    slo_itl_s: float = 0.0


class LoadMeter:
    """Counts what the router is asked for and what came of it. A retry is part of the request that it goes on with."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def read(self) -> dict[str, ModelLoad]:
        """Since the start."""
        names = ModelLoad.__struct_fields__
        return {model: ModelLoad(**{name: getattr(sums, name) for name in names}) for model, sums in self._sums.items()}

    def arrived(self, request: RoutableRequest) -> None:
        if request.is_retry or (sums := self._of(request.model)) is None:
            return
        sums.arrived += 1
        sums.arrived_tokens += request.prompt_tokens
        if request.slo_itl_s is not None:
            sums.with_itl += 1
            sums.slo_itl_s += request.slo_itl_s

    def refused(self, request: RoutableRequest) -> None:
        """It has arrived, and will not be served."""
        if _has_slo(request) and (sums := self._of(request.model)) is not None:
            sums.judged += 1

    def released(
        self, request: RoutableRequest, observed: Observed, *, submitted_at: float, bound_at: float, now: float
    ) -> None:
        """What an attempt has come to."""
        tokens = observed.completion_tokens
        if observed.outcome is not _FINISHED or (sums := self._of(request.model)) is None:
            return
        prompt, uncached = request.prompt_tokens, max(0, request.prompt_tokens - (observed.cached_tokens or 0))
        sums.ended += 1
        sums.prompt_tokens += prompt
        sums.uncached_tokens += uncached
        sums.pairs += uncached * (prompt - uncached / 2)
        first_at = now if observed.ttft_s is None else bound_at + observed.ttft_s
        itl_s = 0.0
        if tokens > 1:
            streamed_s = max(0.0, now - first_at)
            itl_s = streamed_s / (tokens - 1)
            sums.streams += 1
            sums.stream_tokens += tokens - 1
            sums.stream_kv_tokens += (tokens - 1) * (prompt + tokens / 2)
            sums.stream_s += streamed_s
        if _has_slo(request) and not request.is_retry:
            is_first_in_time = request.slo_ttft_s is None or first_at - submitted_at <= request.slo_ttft_s
            sums.judged += 1
            sums.good += is_first_in_time and (request.slo_itl_s is None or itl_s <= request.slo_itl_s)

    def _of(self, model: str) -> _Sums | None:
        sums = self._sums.get(model)
        if sums is None and len(self._sums) < _MAX_MODELS:
            sums = self._sums[model] = _Sums()
        return sums


def _has_slo(request: RoutableRequest) -> bool:
    return request.slo_ttft_s is not None or request.slo_itl_s is not None
