import pytest

from router.policies.mooncake import Mooncake


def test_prefill_goes_where_queue_and_computation_end_first(worker, view, request_of):
    fleet = view(
        worker("a", cached_tokens=8000, queue_s=0.5), worker("b", cached_tokens=4000, queue_s=0.4), worker("c")
    )
    choice = Mooncake().choose(request_of(8800), fleet)
    # 0.01 + u / 8000 + 2e-9 * u * (n - u / 2) for u = 800, 4800, 8800
    totals = [candidate.total_s for candidate in choice.candidates]
    assert totals == pytest.approx([0.5 + 0.12344, 0.4 + 0.67144, 1.18744])
    assert choice.chosen.decode == "a"


def test_decode_goes_where_a_step_will_be_shortest(worker, view, request_of):
    fleet = view(
        worker("p", "prefill"),
        worker("d0", "decode", num_running=10, kv_tokens=1_000),
        worker("d1", "decode", num_running=2, kv_tokens=100_000),
    )
    # d0: 11 * 5e-5 + 1.1e3 * 2e-8 = 0.57 ms beyond the fixed part; d1: 3 * 5e-5 + 1e5 * 2e-8 = 2.15 ms
    assert Mooncake().choose(request_of(100), fleet).chosen.decode == "d0"
