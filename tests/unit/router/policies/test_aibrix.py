from router.policies.aibrix import Aibrix


def test_the_gate_sends_to_the_least_loaded(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=144, num_running=9), worker("b", num_running=1), worker("c"))
    # mean 10 / 3, 9 > 2 * 4.33 and 9 - 0 >= 8
    assert Aibrix().choose(request_of(160), fleet).chosen.decode == "c"


def test_the_best_match_within_one_sigma_wins(worker, view, request_of):
    fleet = view(
        worker("a", cached_tokens=144, num_running=7),
        worker("b", cached_tokens=48, num_running=4),
        worker("c", cached_tokens=16, num_running=1),
    )
    # mean 4, sigma sqrt(6) = 2.45: a has 7 > 6.45
    assert Aibrix().choose(request_of(160), fleet).chosen.decode == "b"


def test_without_a_match_the_fewest_requests_win(worker, view, request_of):
    fleet = view(worker("a", num_running=3), worker("b", num_running=2))
    assert Aibrix().choose(request_of(160), fleet).chosen.decode == "b"
