from router.policies.ray_prefix import RayPrefix


def test_the_longest_match_wins_while_queues_are_even(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=16, num_running=9), worker("b"))
    assert RayPrefix().choose(request_of(160), fleet).chosen.decode == "a"


def test_uneven_queues_mean_power_of_two(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=144, num_running=10), worker("b"))
    assert RayPrefix().choose(request_of(160), fleet).chosen.decode == "b"


def test_a_short_match_counts_for_nothing_and_the_emptiest_wins(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=16, num_cached=5), worker("b", num_cached=4))
    assert RayPrefix().choose(request_of(161), fleet).chosen.decode == "b"


def test_equal_matches_are_decided_by_load(worker, view, request_of):
    fleet = view(
        worker("a", cached_tokens=32, num_running=2), worker("b", cached_tokens=32, num_running=1), worker("c")
    )
    assert RayPrefix().choose(request_of(160), fleet).chosen.decode == "b"
