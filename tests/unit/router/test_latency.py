import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planes.wire.messages import LatencyPrior, StepSample
from router.latency import LatencyModel, LinkModel

PRIOR = LatencyPrior()
anything = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -1.0, 1e-300, 1e300, 1e-9, 3600.0])
)
counts = st.one_of(st.integers(-5, 100_000), st.sampled_from([0, 2**63, 10**400]))


def prefill_truth(tokens, pairs, scale=1.0):
    return scale * (0.03 + tokens / 2000 + pairs * 1e-8)


def step_truth(batch, kv, scale=1.0):
    return scale * (0.02 + batch * 2e-4 + kv * 1e-7)


def steps(rng, number, scale=1.0):
    samples = []
    for _ in range(number):
        batch, kv = rng.randint(1, 60), rng.randint(1000, 100_000)
        if rng.random() < 0.4:
            tokens = rng.randint(16, 2048)
            pairs = tokens * rng.randint(tokens, 8000)
            seconds = prefill_truth(tokens, pairs, scale)
            if rng.random() < 0.5:
                seconds += scale * (batch * 2e-4 + kv * 1e-7)
                samples.append(StepSample(tokens, pairs, batch, kv, seconds * rng.uniform(0.95, 1.05)))
            else:
                samples.append(StepSample(tokens, pairs, 0, 0, seconds * rng.uniform(0.95, 1.05)))
        else:
            samples.append(StepSample(0, 0, batch, kv, step_truth(batch, kv, scale) * rng.uniform(0.95, 1.05)))
    return samples


def test_answers_with_the_prior_before_the_first_sample():
    model = LatencyModel(PRIOR)
    assert model.prefill_s(1000, 3000) == pytest.approx(0.01 + 1000 / 8000 + 2e-9 * 1000 * 2500)
    assert model.step_s(10, 5000) == pytest.approx(0.008 + 5e-4 + 1e-4)
    assert LinkModel(PRIOR).handover_s(4_000_000) == pytest.approx(0.005 + 0.001)


def test_counts_the_fixed_part_once_a_step():
    model = LatencyModel(PRIOR, max_step_tokens=1000)
    once = LatencyModel(PRIOR)
    assert model.prefill_s(2500, 2500) - once.prefill_s(2500, 2500) == pytest.approx(2 * 0.01)


def test_learns_a_worker_four_times_slower_than_its_prior_from_mixed_steps():
    model, rng = LatencyModel(PRIOR), random.Random(1)
    for _ in range(30):
        model.learn(steps(rng, 10))
    for tokens, prompt in [(200, 200), (1000, 4000), (2000, 2000)]:
        truth = prefill_truth(tokens, tokens * (prompt - tokens / 2))
        assert model.prefill_s(tokens, prompt) == pytest.approx(truth, rel=0.15)
    assert model.step_s(30, 50_000) == pytest.approx(step_truth(30, 50_000), rel=0.1)
    assert model.prefill_error_ratio < 0.15
    assert model.step_error_ratio < 0.15


def test_notices_a_slowdown_of_three_within_twenty_steps():
    model, rng = LatencyModel(PRIOR), random.Random(2)
    for _ in range(40):
        model.learn(steps(rng, 10))
    model.learn(steps(rng, 10, scale=3.0))
    model.learn(steps(rng, 10, scale=3.0))
    assert model.prefill_s(1000, 1000) == pytest.approx(prefill_truth(1000, 500_000, 3.0), rel=0.3)
    assert model.step_s(30, 50_000) == pytest.approx(step_truth(30, 50_000, 3.0), rel=0.3)


def test_decoding_for_long_does_not_wear_out_what_is_known_of_prefill():
    model, rng = LatencyModel(PRIOR), random.Random(3)
    for _ in range(40):
        model.learn(steps(rng, 10))
    before = model.prefill_s(1000, 1000)
    for _ in range(300):
        model.learn([StepSample(0, 0, 20, 20_000, step_truth(20, 20_000))] * 10)
    assert model.prefill_s(1000, 1000) == pytest.approx(before, rel=0.15)


def test_one_hiccup_moves_little():
    model, rng = LatencyModel(PRIOR), random.Random(4)
    for _ in range(40):
        model.learn(steps(rng, 10))
    before = model.step_s(30, 50_000)
    model.learn([StepSample(0, 0, 30, 50_000, 30.0)])
    assert model.step_s(30, 50_000) < 1.25 * before


def test_learns_whole_prefills_where_no_steps_are_reported():
    model = LatencyModel(PRIOR)
    for k in range(60):
        model.learn_prefill(500 + 50 * (k % 20), 4000, 5 * PRIOR.prefill_per_token_s * (500 + 50 * (k % 20)))
    assert model.prefill_s(1000, 4000) == pytest.approx(5 * 1000 / 8000, rel=0.15)


def test_link_learns_latency_and_bandwidth():
    link = LinkModel(PRIOR)
    for k in range(200):
        size = (k % 10 + 1) * 10_000_000
        link.learn(size, 0.02 + size / 1e9)
    assert link.handover_s(55_000_000) == pytest.approx(0.075, rel=0.05)
    assert link.error_ratio < 0.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(counts, counts, counts, counts, anything), max_size=30), st.data())
def test_stays_finite_non_negative_and_monotone_whatever_comes_in(samples, data):
    model, link = LatencyModel(PRIOR, max_step_tokens=2048), LinkModel(PRIOR)
    for sample in samples:
        model.learn([StepSample(*sample)])
        model.learn_prefill(sample[0], sample[1], sample[4])
        link.learn(sample[0], sample[4])
    prompt = data.draw(st.integers(1, 200_000))
    fewer, more = sorted((data.draw(st.integers(0, prompt)), data.draw(st.integers(0, prompt))))
    assert 0 <= model.prefill_s(fewer, prompt) <= model.prefill_s(more, prompt) < math.inf
    assert model.prefill_s(fewer, prompt) <= model.prefill_s(fewer, prompt + 1000)
    assert 0 <= model.step_s(fewer, more) <= model.step_s(fewer + 1, more) <= model.step_s(fewer + 1, more + 1)
    assert 0 <= link.handover_s(fewer) <= link.handover_s(more) < math.inf
    errors = (model.prefill_error_ratio, model.step_error_ratio, link.error_ratio)
    assert all(0 <= error <= 10 for error in errors)


@pytest.mark.parametrize("sample", [(0, 0, 4, 1000, 5e-324), (0, 0, 4, 1 << 40, 1e-6), (100, 5000, 0, 0, 1e-6)])
def test_no_step_takes_no_time_whatever_a_worker_tells(sample):
    model = LatencyModel(PRIOR, max_step_tokens=2048)
    for _ in range(300):
        model.learn([StepSample(*sample)] * 128)
    assert model.step_s(1, 0) >= 1e-6
    assert model.prefill_s(1, 1) >= 1e-6


@pytest.mark.parametrize("seconds", [5e-324, 1e-300, 1e-6, 3600.0])
def test_a_step_of_hardly_any_time_or_a_lot_teaches_no_nonsense(seconds):
    model, link = LatencyModel(PRIOR, max_step_tokens=2048), LinkModel(PRIOR)
    for _ in range(10):
        model.learn([StepSample(1000, 1 << 20, 8, 4000, seconds), StepSample(0, 0, 8, 4000, seconds)])
        model.learn_prefill(1000, 2000, seconds)
        link.learn(1 << 20, seconds)
        assert 0 <= model.prefill_s(1000, 2000) < math.inf
        assert 0 <= model.step_s(8, 4000) < math.inf
        assert 0 <= link.handover_s(1 << 20) < math.inf


def test_a_prior_of_zeros_can_still_be_learned_against():
    model = LatencyModel(LatencyPrior(**dict.fromkeys(LatencyPrior.__struct_fields__, 0.0)))
    for _ in range(50):
        model.learn([StepSample(0, 0, 4, 100, 0.05), StepSample(100, 5000, 0, 0, 0.2)] * 4)
    assert model.step_s(4, 100) == pytest.approx(0.05, rel=0.1)
    assert model.prefill_s(100, 100) == pytest.approx(0.2, rel=0.1)


def test_what_was_learned_is_told_as_a_prior_that_predicts_the_same():
    model = LatencyModel(LatencyPrior(), 1000)
    for number in range(200):
        tokens = 100 + number % 7 * 100
        model.learn(
            [StepSample(tokens, tokens * tokens // 2, 0, 0, 0.1 + tokens / 2000), StepSample(0, 0, 4, 4000, 0.03)]
        )
    copy = LatencyModel(model.learned, 1000)
    assert copy.prefill_s(700, 900) == pytest.approx(model.prefill_s(700, 900), rel=1e-3)
    assert copy.step_s(5, 5000) == pytest.approx(model.step_s(5, 5000), rel=1e-3)
    assert model.num_samples == 400
