from router.policies.power_of_two import PowerOfTwo


def test_the_busiest_worker_never_wins(worker, view, request_of):
    fleet = view(worker("a", num_running=3), worker("b", num_waiting=2), worker("c", num_running=1))
    chosen = [PowerOfTwo().choose(request_of(100), fleet).chosen.decode for _ in range(300)]
    assert "a" not in chosen
    assert 70 < chosen.count("b") < 130  # wins one of the three equally likely pairs: {a, b}


def test_one_worker_is_enough(worker, view, request_of):
    assert PowerOfTwo().choose(request_of(100), view(worker("a"))).chosen.decode == "a"
