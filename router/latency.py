"""How long things take, learned online: non-negative least squares on what was measured, anchored to the priors.

    prefill(u of n) = steps * fixed + per_token * u + per_pair * u (n - u / 2)      steps = ceil(u / max_step_tokens)
    step(batch, kv) = fixed + per_sequence * batch + per_kv_token * kv
    handover(bytes) = fixed + bytes / bandwidth

Two time scales. Coefficients are fitted with forgetting over the last hundred samples or so, prefill and decode apart:
a minute of pure decoding must not wear out what is known of prefill. A `speed` factor common to both follows the ratio
of measured to predicted within about ten samples: a worker that slows down is noticed at once and in everything it
does. Each sample's ratio is clipped first, and a sample far off counts less, so one hiccup moves little.

Samples are scaled by the prior's seconds, so that every unknown is a factor near 1, and weighted by one over their
duration squared: it is the relative error that counts. Whatever comes in, predictions stay finite, non-negative, and
monotone in each argument.
"""

import math
from collections.abc import Sequence
from operator import mul

from planes.wire.messages import LatencyPrior, StepSample

_FORGET = 0.99
_FORGET_FAR_OFF = 0.6  # a few samples in a row that are off by the whole clip leave little of what was learned before
_ANCHOR = 1e-3  # weight of the prior's proportions, against that of the samples
_SPEED_GAIN = 0.15
_SPEED_LEAK = 0.998  # per sample; the rest moves over into the coefficients
_MAX_LOG_RATIO = math.log(8.0)
_MAX_LOG_SPEED = math.log(1000.0)
_MAX_LOG_STEP = 0.7
_MAX_FACTOR = 1e6
_SWEEPS = 4
_ERROR_GAIN = 0.05
_LEAST_SECONDS = 1e-6  # no step is faster, whatever a worker tells; prices divide by what one takes
_MAX_SECONDS = 3600.0
_MAX_COUNT = 1 << 48  # tokens, pairs, bytes: beyond any engine, and safe to turn into a float
_MAX_BYTES_PER_S = 1e18
_LEAST_PRIOR = 1e-3  # of the default prior: what a prior of zero stands for, there must be a scale to learn against


def is_plausible(seconds: float) -> bool:
    """Whether a measured duration can be learned from: a microsecond to an hour."""
    return _LEAST_SECONDS <= seconds <= _MAX_SECONDS


def _log_ratio(seconds: float, predicted: float, most: float) -> float:
    """-`most` to `most`."""
    return max(-most, min(most, math.log(seconds / predicted)))


class Fit:
    """`seconds = sum(factor[i] * x[i])` with factors >= 0; x[i] are the prior's seconds for each part of the work.

    Minimises the weighted squared relative error over samples forgotten exponentially, plus a weak pull towards the
    prior's proportions.
    """

    def __init__(self, size: int) -> None:
        self.factors = [1.0] * size
        self._a = [[0.0] * size for _ in range(size)]
        self._b = [0.0] * size
        self._indices = range(size)
        self._is_news = False
        """Samples have come that `solve` has not seen."""

    def predict(self, x: Sequence[float]) -> float:
        seconds: float = sum(map(mul, self.factors, x))
        return seconds

    def add(self, x: Sequence[float], seconds: float) -> None:
        """Take in a sample; call `solve` after a batch of them."""
        predicted = self.predict(x)
        if not 0.0 < predicted < math.inf:
            return
        self._is_news = True
        log_ratio = _log_ratio(seconds, predicted, _MAX_LOG_RATIO)
        seconds = predicted * math.exp(log_ratio)
        weight = min(1.0, 0.7 / max(abs(log_ratio), 1e-9)) / (seconds * max(seconds, predicted))
        forget = _FORGET if abs(log_ratio) < _MAX_LOG_RATIO else _FORGET_FAR_OFF
        for i in self._indices:
            row, xi = self._a[i], weight * x[i]
            for j in self._indices:
                row[j] = row[j] * forget + xi * x[j]
            self._b[i] = self._b[i] * forget + xi * seconds

    def rescale(self, ratio: float) -> None:
        """Everything measured so far, and the fit, as if it had taken `ratio` times as long."""
        self.factors = [min(factor * ratio, _MAX_FACTOR) for factor in self.factors]
        self._b = [part * ratio for part in self._b]

    def solve(self) -> None:
        """Projected coordinate descent, warm: a few sweeps follow the slowly moving optimum."""
        if not self._is_news:
            return
        self._is_news = False
        factors, a, b = self.factors, self._a, self._b
        total = sum(map(sum, a))
        if total <= 0.0:
            return
        common = sum(b) / total  # the one factor that fits best: directions that the data leave open go there
        anchor = _ANCHOR * sum((a[i][i] for i in self._indices), start=0.0)
        pull = anchor * common
        rows = [(i, a[i], a[i][i], b[i] + pull, a[i][i] + anchor) for i in self._indices]
        for _ in range(_SWEEPS):
            for i, row, own, wanted, weight in rows:
                factor = (wanted - sum(map(mul, row, factors)) + own * factors[i]) / weight
                factors[i] = min(factor, _MAX_FACTOR) if factor > 0.0 else 0.0


class LatencyModel:
    """Prefill and decode seconds of one worker."""

    def __init__(self, prior: LatencyPrior, max_step_tokens: int = 0) -> None:
        """`max_step_tokens`: prompt tokens that one step computes at most; 0: any number."""
        default = LatencyPrior()
        self._prefill_prior = (
            _scale(prior.prefill_fixed_s, default.prefill_fixed_s),
            _scale(prior.prefill_per_token_s, default.prefill_per_token_s),
            _scale(prior.prefill_per_pair_s, default.prefill_per_pair_s),
        )
        self._step_prior = (
            _scale(prior.step_fixed_s, default.step_fixed_s),
            _scale(prior.step_per_sequence_s, default.step_per_sequence_s),
            _scale(prior.step_per_kv_token_s, default.step_per_kv_token_s),
        )
        self._max_step_tokens = max_step_tokens
        self._prefill_fit, self._step_fit = Fit(3), Fit(3)
        self._log_speed = 0.0
        self.prefill_error_ratio = 0.0
        """Mean of |predicted - measured| / measured over the last steps that computed prompts."""
        self.step_error_ratio = 0.0
        """The same for pure decode steps."""
        self.num_samples = 0
        self._update()

    @property
    def speed(self) -> float:
        """Recent slowdown against what the coefficients say; 1 is none."""
        return math.exp(self._log_speed)

    @property
    def learned(self) -> LatencyPrior:
        """What it predicts with now, in the shape of a prior; of handovers it knows nothing but the default."""
        prefill_fixed_s, per_token_s, per_pair_s = self._prefill
        step_fixed_s, per_sequence_s, per_kv_token_s = self._step
        return LatencyPrior(
            prefill_fixed_s=prefill_fixed_s,
            prefill_per_token_s=per_token_s,
            prefill_per_pair_s=per_pair_s,
            step_fixed_s=step_fixed_s,
            step_per_sequence_s=per_sequence_s,
            step_per_kv_token_s=per_kv_token_s,
        )

    def prefill_s(self, uncached_tokens: int, prompt_tokens: int) -> float:
        """Seconds to compute the last `uncached_tokens` of `prompt_tokens`, 0 <= uncached_tokens <= prompt_tokens."""
        fixed = self._prefill[0]
        if 0 < self._max_step_tokens < uncached_tokens:
            fixed *= -(-uncached_tokens // self._max_step_tokens)
        return fixed + self.work_s(uncached_tokens, prompt_tokens)

    def work_s(self, uncached_tokens: int, prompt_tokens: int) -> float:
        """The same without what each step costs: what a prompt adds to steps that are taken anyway."""
        _, per_token, per_pair = self._prefill
        return uncached_tokens * (per_token + per_pair * (prompt_tokens - uncached_tokens / 2))

    def fixed_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of a step that computes prompts, beside their work: with `batch` sequences that decode in it."""
        fixed = self._prefill[0]
        if not batch:
            return fixed
        decoding, per_sequence, per_kv_token = self._step
        return max(decoding, fixed) + per_sequence * batch + per_kv_token * kv_tokens

    def step_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step for `batch` sequences with `kv_tokens` of context in all."""
        fixed, per_sequence, per_kv_token = self._step
        return fixed + per_sequence * batch + per_kv_token * kv_tokens

    def learn(self, samples: Sequence[StepSample]) -> None:
        """Take in engine steps as they come in load reports, mixed ones too. Implausible ones are passed over."""
        for sample in samples:
            if not _is_sane(sample):
                continue
            self.num_samples += 1
            if sample.prefill_tokens:
                self._learn_prefill(sample)
            else:
                x = (
                    self._step_prior[0],
                    self._step_prior[1] * sample.batch,
                    self._step_prior[2] * sample.kv_tokens,
                )
                speed = self.speed
                predicted = speed * self._step_fit.predict(x)
                self.step_error_ratio += _ERROR_GAIN * (_error(predicted, sample.duration_s) - self.step_error_ratio)
                self._step_fit.add(x, sample.duration_s / speed)
                self._follow(predicted, sample.duration_s)
        if samples:
            self._settle(len(samples))

    def learn_prefill(self, uncached_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """Take in a whole prefill, for engines that report no steps."""
        if not is_plausible(seconds) or not 0 < uncached_tokens <= prompt_tokens < _MAX_COUNT:
            return
        self.num_samples += 1
        steps = -(-uncached_tokens // self._max_step_tokens) if self._max_step_tokens else 1
        fixed, per_token, per_pair = self._prefill_prior
        pairs = uncached_tokens * (prompt_tokens - uncached_tokens / 2)
        self._fit_prefill((fixed * steps, per_token * uncached_tokens, per_pair * pairs), 0.0, seconds)
        self._settle(1)

    def _learn_prefill(self, sample: StepSample) -> None:
        decoding = 0.0
        if sample.batch:
            _, per_sequence, per_kv_token = self._step_prior
            _, sequence_factor, kv_factor = self._step_fit.factors
            decoding = sequence_factor * per_sequence * sample.batch + kv_factor * per_kv_token * sample.kv_tokens
        fixed, per_token, per_pair = self._prefill_prior
        x = (fixed, per_token * sample.prefill_tokens, per_pair * sample.prefill_pairs)
        self._fit_prefill(x, decoding, sample.duration_s)

    def _fit_prefill(self, x: tuple[float, float, float], decoding_s: float, seconds: float) -> None:
        speed = self.speed
        predicted = speed * (self._prefill_fit.predict(x) + decoding_s)
        self.prefill_error_ratio += _ERROR_GAIN * (_error(predicted, seconds) - self.prefill_error_ratio)
        # What decoding took of a mixed step is known only so well: at least a twentieth is the prompt's.
        self._prefill_fit.add(x, max(seconds / speed - decoding_s, seconds / speed / 20))
        self._follow(predicted, seconds)

    def _follow(self, predicted: float, seconds: float) -> None:
        if predicted > 0.0:
            step = _log_ratio(seconds, predicted, _MAX_LOG_STEP)
            log_speed = self._log_speed + _SPEED_GAIN * step
            self._log_speed = max(-_MAX_LOG_SPEED, min(_MAX_LOG_SPEED, log_speed))

    def _settle(self, num_samples: int) -> None:
        """Solve, and move a part of `speed` over into all coefficients: what lasts ends up there."""
        moved = self._log_speed * (1 - _SPEED_LEAK**num_samples)
        self._log_speed -= moved
        for fit in (self._prefill_fit, self._step_fit):
            fit.rescale(math.exp(moved))
            fit.solve()
        self._update()

    def _update(self) -> None:
        speed = self.speed
        self._prefill = _scaled(self._prefill_prior, self._prefill_fit.factors, speed)
        self._step = _scaled(self._step_prior, self._step_fit.factors, speed)


class LinkModel:
    """Handover seconds between one prefill and one decode worker."""

    def __init__(self, prior: LatencyPrior) -> None:
        default = LatencyPrior()
        per_byte = 1 / prior.handover_bytes_per_s if prior.handover_bytes_per_s > 0 else 0.0
        self._prior = (
            _scale(prior.handover_fixed_s, default.handover_fixed_s),
            _scale(per_byte, 1 / default.handover_bytes_per_s),
        )
        self._fit = Fit(2)
        self.error_ratio = 0.0
        """Mean of |predicted - measured| / measured over the last handovers."""
        self._fixed, self._per_byte = self._prior

    @property
    def fixed_s(self) -> float:
        """Seconds of a handover whatever its size."""
        return self._fixed

    @property
    def bytes_per_s(self) -> float:
        """At most 1e18, which stands for any number."""
        return min(_MAX_BYTES_PER_S, 1 / self._per_byte) if self._per_byte > 0 else _MAX_BYTES_PER_S

    def handover_s(self, num_bytes: int) -> float:
        """Seconds to move `num_bytes`, 0 or more."""
        return self._fixed + self._per_byte * num_bytes

    def learn(self, num_bytes: int, seconds: float) -> None:
        """Take in a handover. Implausible ones are passed over."""
        if not is_plausible(seconds) or not 0 <= num_bytes < _MAX_COUNT:
            return
        self.error_ratio += _ERROR_GAIN * (_error(self.handover_s(num_bytes), seconds) - self.error_ratio)
        self._fit.add((self._prior[0], self._prior[1] * num_bytes), seconds)
        self._fit.solve()
        self._fixed = self._prior[0] * self._fit.factors[0]
        self._per_byte = self._prior[1] * self._fit.factors[1]


def _scale(seconds: float, default_s: float) -> float:
    least = _LEAST_PRIOR * default_s
    return min(max(seconds, least), _MAX_SECONDS) if math.isfinite(seconds) else least


def _is_sane(sample: StepSample) -> bool:
    counts = (sample.prefill_tokens, sample.prefill_pairs, sample.batch, sample.kv_tokens)
    return (
        is_plausible(sample.duration_s)
        and all(0 <= count < _MAX_COUNT for count in counts)
        and bool(sample.prefill_tokens or sample.batch)
    )


def _error(predicted: float, measured: float) -> float:
    return min(abs(predicted - measured) / measured, 10.0)


def _scaled(prior: tuple[float, float, float], factors: Sequence[float], speed: float) -> tuple[float, float, float]:
    fixed = max(_LEAST_SECONDS, speed * factors[0] * prior[0])
    return fixed, speed * factors[1] * prior[1], speed * factors[2] * prior[2]
