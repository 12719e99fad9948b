import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serving.blame import Cause, LegFailure, Suspects, failure_of, suspects
from app.serving.errors import RoleChanged, TicketExpired, WorkerBusy, WorkerDisagrees, WorkerFailed, WorkerRefused
from planes.streams.client import WorkerLost, WorkerUnreachable
from planes.wire.messages import WorkerId

PAIR = (WorkerId("p0"), WorkerId("d0"))


def handover(prefill, decode):
    return LegFailure(Cause.HANDOVER, WorkerId(decode), (WorkerId(prefill), WorkerId(decode)))


def worker(name):
    return LegFailure(Cause.WORKER, WorkerId(name))


def well(name, cause):
    return LegFailure(cause, WorkerId(name))


@pytest.mark.parametrize(
    ("failures", "blamed", "suspected"),
    [
        ([], set(), set()),
        ([worker("d0")], {"d0"}, set()),
        ([handover("p0", "d0")], set(), {"p0", "d0"}),
        ([handover("p0", "d0"), handover("p1", "d0")], {"d0"}, set()),
        ([handover("p0", "d0"), handover("p0", "d1")], {"p0"}, set()),
        ([handover("p0", "d0"), handover("p0", "d0")], set(), {"p0", "d0"}),
        ([handover("p0", "d0"), handover("p1", "d1")], set(), {"p0", "d0", "p1", "d1"}),
        ([handover("p0", "d0"), worker("d0")], {"d0"}, set()),
        ([handover("p0", "d0"), handover("p1", "d0"), handover("p2", "d1")], {"d0"}, {"p2", "d1"}),
        ([LegFailure(Cause.EXPIRED, WorkerId("p0"))], set(), set()),
    ],
)
def test_who_explains_most_is_blamed_and_clears_the_others(failures, blamed, suspected):
    found = suspects(failures)
    assert (found.blamed, found.suspected) == (blamed, suspected)


@pytest.mark.parametrize("cause", [Cause.BUSY, Cause.ROLE])
def test_a_worker_that_is_well_is_avoided_and_not_blamed(cause):
    assert suspects([well("d0", cause), worker("d1")]) == Suspects(
        blamed=frozenset({WorkerId("d1")}), busy=frozenset({WorkerId("d0")})
    )


def test_suspects_are_left_out_while_anybody_else_is_there_the_prefill_worker_last():
    found = suspects([worker("d9"), handover("p0", "d0")])
    assert found.exclusions() == [{"d9", "p0", "d0"}, {"d9", "p0"}, {"d9"}]
    assert suspects([worker("d9")]).exclusions() == [{"d9"}]
    assert suspects([]).exclusions() == [frozenset()]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WorkerLost(PAIR[1], "killed"), Cause.WORKER),
        (WorkerUnreachable(PAIR[1], "gone"), Cause.WORKER),
        (WorkerRefused(PAIR[1], "worker_draining", "it leaves"), Cause.WORKER),
        (WorkerBusy(PAIR[1], "1056 requests"), Cause.BUSY),
        (RoleChanged(PAIR[1], "a DecodeLeg came to a worker whose role is prefill"), Cause.ROLE),
        (TicketExpired(PAIR[1], "30 s"), Cause.EXPIRED),
        (WorkerFailed(PAIR[1], "engine_error", "no KV cache"), Cause.HANDOVER),
        (WorkerDisagrees(PAIR[1], "invalid_request", "the ticket's blocks have 16384 bytes"), Cause.HANDOVER),
    ],
)
def test_only_what_may_be_the_other_one_s_fault_is_about_the_handover(error, kind):
    assert failure_of(error, pair=PAIR).kind is kind
    assert failure_of(error).kind is (Cause.WORKER if kind is Cause.HANDOVER else kind)


WORKERS = [WorkerId(f"{role}{number}") for role in "pd" for number in range(4)]


@given(st.sampled_from(WORKERS), st.lists(st.tuples(st.sampled_from(WORKERS[:4]), st.sampled_from(WORKERS[4:]))))
def test_no_healthy_worker_is_blamed_for_what_one_broken_worker_explains(broken, tried):
    failures = [handover(prefill, decode) for prefill, decode in tried if broken in (prefill, decode)]
    found = suspects(failures)
    assert found.blamed <= {broken}
    if found.blamed:
        assert not found.suspected, "who explains everything clears the rest"
