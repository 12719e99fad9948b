from router.policies.sglang_cache_aware import SglangCacheAware


def test_a_long_match_wins(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=64, num_running=60), worker("b", num_cached=0))
    assert SglangCacheAware().choose(request_of(160), fleet).chosen.decode == "a"


def test_a_short_match_loses_against_the_smallest_tree(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=48, num_cached=10), worker("b", num_cached=9))
    assert SglangCacheAware().choose(request_of(160), fleet).chosen.decode == "b"  # 48 / 160 is not above 0.3


def test_out_of_balance_the_least_loaded_wins(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=144, num_running=65), worker("b"))
    assert SglangCacheAware().choose(request_of(160), fleet).chosen.decode == "b"


def test_a_large_difference_alone_is_no_imbalance(worker, view, request_of):
    fleet = view(worker("a", cached_tokens=144, num_running=210), worker("b", num_running=145))
    assert SglangCacheAware().choose(request_of(160), fleet).chosen.decode == "a"  # 210 is not above 1.5 * 145
