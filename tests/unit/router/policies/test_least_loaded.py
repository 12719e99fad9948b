from router.policies.least_loaded import LeastLoaded


def test_prefill_goes_by_tokens_and_decode_by_requests(worker, view, request_of):
    fleet = view(
        worker("p0", "prefill", waiting_prefill_tokens=900, num_waiting=1),
        worker("p1", "prefill", waiting_prefill_tokens=800, num_waiting=5),
        worker("d0", "decode", num_running=3, kv_tokens=10),
        worker("d1", "decode", num_running=2, kv_tokens=90_000),
    )
    chosen = LeastLoaded().choose(request_of(100), fleet).chosen
    assert (chosen.prefill, chosen.decode) == ("p1", "d1")


def test_requests_break_ties_between_workers_that_do_both(worker, view, request_of):
    fleet = view(worker("a", num_running=8), worker("b", num_running=7))
    assert LeastLoaded().choose(request_of(100), fleet).chosen.decode == "b"
