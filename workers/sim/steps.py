"""How long the simulated engine's steps take, and the run of steps in progress."""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

from planes.wire.messages import LatencyPrior, StepSample

MAX_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class _StepRun:
    """Steps that ended: the first one's work, its start, and all ends. Each further step has `batch` more kv tokens."""

    prefill_tokens: int
    prefill_pairs: int
    batch: int
    kv_tokens: int
    start: float
    ends: list[float]


class Steps:
    """A clock for steps. One fixed cost per step (the larger of the two, if it has both kinds of work), then

    prefill_per_token_s * tokens + prefill_per_pair_s * pairs + step_per_sequence_s * batch + step_per_kv_token_s * kv

    all of it times `slowdown`. A run is one step, or several decode steps of one batch.
    """

    def __init__(self, speed: LatencyPrior) -> None:
        self.slowdown = 1.0
        self.ends: list[float] = []
        """Ends of the run in progress; empty: none is."""
        self.last_ends: list[float] = []
        self._speed = speed
        self._work = (0, 0, 0, 0, 0.0)
        self._runs: deque[_StepRun] = deque(maxlen=MAX_SAMPLES)
        self._last: _StepRun | None = None

    @property
    def busy_until(self) -> float | None:
        return self.ends[-1] if self.ends else None

    def begin(
        self, now: float, prefill: int, pairs: int, batch: int, kv_tokens: int, *, most: int, horizon: float
    ) -> None:
        """Begin a run of at most `most` steps, all but the first of which begin before `horizon`."""
        speed = self._speed
        fixed = speed.prefill_fixed_s if prefill else speed.step_fixed_s
        if prefill and batch:
            fixed = max(fixed, speed.step_fixed_s)
        fixed += speed.prefill_per_token_s * prefill + speed.prefill_per_pair_s * pairs
        fixed += speed.step_per_sequence_s * batch
        self._work = (prefill, pairs, batch, kv_tokens, now)
        per_kv, slowdown, end = speed.step_per_kv_token_s, self.slowdown, now
        ends: list[float] = []
        while len(ends) < most and (end < horizon or not ends):
            end += slowdown * (fixed + per_kv * kv_tokens)
            ends.append(end)
            kv_tokens += batch
        self.ends = ends

    def cut(self, now: float) -> bool:
        """Keep only the steps that had begun by `now`. Returns whether that changed the run."""
        begun = bisect_right(self.ends, now) + 1
        is_cut = begun < len(self.ends)
        del self.ends[begun:]
        return is_cut

    def ended_by(self, now: float) -> int:
        """Steps of the run in progress that have ended by `now`."""
        return bisect_right(self.ends, now)

    def end(self) -> int:
        """End the run. Returns its number of steps."""
        prefill, pairs, batch, kv_tokens, start = self._work
        self.last_ends, self.ends = self.ends, []
        self._last = _StepRun(prefill, pairs, batch, kv_tokens, start, self.last_ends)
        self._runs.append(self._last)
        return len(self.last_ends)

    @property
    def last_sample(self) -> StepSample | None:
        return None if self._last is None else _samples(self._last)[-1]

    def take_samples(self) -> list[StepSample]:
        """Steps that ended since the last call, newest last, at most 256."""
        samples = [sample for run in self._runs for sample in _samples(run)]
        self._runs.clear()
        return samples[-MAX_SAMPLES:]


def _samples(run: _StepRun) -> list[StepSample]:
    starts = [run.start, *run.ends]
    first = max(0, len(run.ends) - MAX_SAMPLES)
    return [
        StepSample(
            run.prefill_tokens, run.prefill_pairs, run.batch, run.kv_tokens + i * run.batch, run.ends[i] - starts[i]
        )
        for i in range(first, len(run.ends))
    ]
