import msgspec
import pytest

from planes.wire.messages import LatencyPrior
from router.demand import decode_s, largest_batch, prefill_s, prompts_s, step_s
from tests.fakes import FACTS as SMALL

FACTS = msgspec.structs.replace(SMALL, block_size=512, num_blocks=1000, max_batch=128, max_step_tokens=2048)


def test_the_largest_batch_is_bounded_by_slo_memory_and_engine():
    assert largest_batch(FACTS, 100, 10.0) == 128
    assert largest_batch(FACTS, 100_000, 10.0) == 5
    assert largest_batch(FACTS, 1000, 0.0087) == 9
    assert largest_batch(FACTS, 1000, 0.001) == 1


def test_prompts_share_steps_as_far_as_they_are_not_full():
    speed = LatencyPrior()
    short, full = prefill_s(FACTS, 1, 1), prefill_s(FACTS, 4096, 4096)
    assert short == pytest.approx(speed.prefill_fixed_s / 128 + speed.prefill_per_token_s, rel=1e-3)
    work_s = 4096 * speed.prefill_per_token_s + 4096 * 2048 * speed.prefill_per_pair_s
    assert full == pytest.approx(2 * speed.prefill_fixed_s + work_s)
    assert prompts_s(FACTS, 3, 3 * 4096, 3 * 4096 * 2048) == pytest.approx(3 * full)


def test_an_answer_takes_its_part_of_the_largest_batch():
    batch = largest_batch(FACTS, 1000, 0.05)
    assert decode_s(FACTS, batch, 1000, 0.05) == pytest.approx(step_s(FACTS.latency, batch, batch * 1000))
    assert decode_s(FACTS, 100, 1000, 0.05) < decode_s(FACTS, 100, 1000, 0.012), "a tight SLO makes batches small"
