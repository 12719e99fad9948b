import pytest

from router.policies.dynamo import Dynamo


def test_the_cost_of_a_worker_that_does_both_is_its_missing_plus_its_active_blocks(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=64, waiting_prefill_tokens=32, kv_tokens=160), worker("b", kv_tokens=16))
    choice = Dynamo().choose(request_of(160), fleet)
    # a: (32 + 160 - 64) / 16 + 160 / 16 = 18; b: 160 / 16 + 16 / 16 = 11
    assert [candidate.total_s for candidate in choice.candidates] == [18.0, 11.0]
    assert choice.chosen.decode == "b"


def test_the_decode_leg_ignores_cached_blocks_and_prefill(worker, view, request_of):
    fleet = view(
        worker("p", "prefill"),
        worker("d0", "decode", cached_tokens=144, kv_tokens=32),
        worker("d1", "decode", waiting_prefill_tokens=9000, kv_tokens=16),
    )
    assert Dynamo().choose(request_of(160), fleet).chosen.decode == "d1"


def test_credit_beyond_the_work_costs_nothing(worker, view, request_of):
    choice = Dynamo(scale=3.0, request_weight=2.0).choose(request_of(16), view(worker("a", num_running=2)))
    assert choice.chosen.total_s == 3.0 * 1 + 2.0 * 2


def test_conditional_disaggregation_is_off_unless_asked_for(worker, view, request_of):
    fleet = view(worker("p", "prefill"), worker("d", "decode", cached_tokens=800))
    assert Dynamo().choose(request_of(1600), fleet).chosen.prefill == "p"
    conditional = Dynamo(is_conditional=True)
    assert conditional.choose(request_of(1600), fleet).chosen.prefill is None  # 800 < 2048 and 0.5 < 0.7
    assert conditional.choose(request_of(4000), fleet).chosen.prefill == "p"  # 3200 uncached are too many
    assert conditional.choose(request_of(2700), fleet).chosen.prefill == "p"  # 1900 / 2700 is 0.7 and more


def test_temperature_spreads_requests_and_keeps_the_order(worker, view, request_of):
    fleet = view(worker("a", kv_tokens=0), worker("b", kv_tokens=1600))
    chosen = [Dynamo(temperature=1.0).choose(request_of(160), fleet).chosen.decode for _ in range(1000)]
    assert 690 < chosen.count("a") < 770  # 1 / (1 + exp(-1)) = 0.731


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match=r"temperature is -1"):
        Dynamo(temperature=-1)
