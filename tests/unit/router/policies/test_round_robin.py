from router.policies.round_robin import RoundRobin


def test_takes_turns_on_each_leg(worker, view, request_of):
    policy = RoundRobin()
    fleet = view(worker("p0", "prefill"), worker("p1", "prefill"), *(worker(f"d{i}", "decode") for i in range(3)))
    pairs = [policy.choose(request_of(100), fleet).chosen for _ in range(4)]
    assert [(pair.prefill, pair.decode) for pair in pairs] == [("p0", "d0"), ("p1", "d1"), ("p0", "d2"), ("p1", "d0")]


def test_goes_on_in_order_when_a_worker_leaves(worker, view, request_of):
    policy = RoundRobin()
    fleet = [worker(name) for name in "abc"]
    assert policy.choose(request_of(100), view(*fleet)).chosen.decode == "a"
    assert policy.choose(request_of(100), view(fleet[0], fleet[2])).chosen.decode == "c"
    assert policy.choose(request_of(100), view(*fleet)).chosen.decode == "a"
