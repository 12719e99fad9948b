import pytest

from planes.wire.messages import LatencyPrior, WorkerId
from router.links import LinkTable

P, D = WorkerId("p"), WorkerId("d")


def table(*workers):
    links = LinkTable()
    for worker in workers:
        links.add(worker, LatencyPrior())
    return links


def test_what_the_last_stream_of_a_worker_that_left_teaches_is_not_kept():
    links = table(P)
    for number in range(1000):
        gone = WorkerId(f"d{number}")
        links.add(gone, LatencyPrior())
        links.learn(P, gone, 1000, 2.0)
        links.drop(gone)
        links.learn(P, gone, 1000, 2.0)
    assert len(links) == 0


def test_a_sender_learns_also_from_what_a_worker_took_that_has_left():
    links = table(P)
    before_s = links.link(P, D).handover_s(1000)
    for _ in range(50):
        links.learn(P, D, 1000, 2.0)
    assert links.link(P, D).handover_s(1000) > 2 * before_s


def test_a_sender_that_left_is_forgotten():
    links = table(P, D)
    links.learn(P, D, 1000, 2.0)
    links.drop(P)
    links.learn(P, D, 1000, 2.0)
    assert (len(links), links.link(P, D).handover_s(0)) == (0, LatencyPrior().handover_fixed_s)


def test_what_a_pair_has_learned_is_told():
    links = table(P, D)
    assert links.statuses() == []
    for megabytes in (1, 10, 100) * 40:
        links.learn(P, D, megabytes << 20, 0.02 + (megabytes << 20) / 1e9)
    (status,) = links.statuses()
    assert (status.prefill, status.decode) == (P, D)
    assert status.fixed_s == pytest.approx(0.02, rel=0.05)
    assert status.bytes_per_s == pytest.approx(1e9, rel=0.05)
    assert links.sender(P).bytes_per_s == pytest.approx(1e9, rel=0.05)
