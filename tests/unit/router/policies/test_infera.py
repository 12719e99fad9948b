from router.policies.infera import Infera


def test_missing_blocks_weigh_twenty_on_the_prefill_leg_and_two_on_the_decode_leg(worker, view, request_of):
    fleet = view(
        worker("p0", "prefill", cached_tokens=32, waiting_prefill_tokens=640),
        worker("p1", "prefill"),
        worker("d0", "decode", cached_tokens=32, kv_tokens=96),
        worker("d1", "decode", kv_tokens=16),
    )
    choice = Infera().choose(request_of(160), fleet)
    # p0: 20 * 8 + 40 = 200 = p1: 20 * 10; d0: 2 * 8 + 6 = 22, d1: 2 * 10 + 1 = 21
    assert choice.chosen.decode == "d1"
    assert sorted(candidate.total_s for candidate in choice.candidates) == [221.0, 221.0, 222.0]
