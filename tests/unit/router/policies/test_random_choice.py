from router.policies.random_choice import RandomChoice


def test_spreads_over_all_workers_whatever_their_load(worker, view, request_of):
    fleet = view(worker("a", num_running=50), worker("b"), worker("c"))
    chosen = [RandomChoice().choose(request_of(100), fleet).chosen.decode for _ in range(300)]
    assert all(70 < chosen.count(name) < 130 for name in "abc")
