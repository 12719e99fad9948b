import random

import numpy as np
import pytest

from planes.wire.messages import (
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    LoadReport,
    Registration,
    RequestId,
    Role,
    WorkerId,
    WorkerState,
)
from router.errors import NoPair
from router.policies import POLICIES, load_policy
from router.policy import Choice
from router.request import HandoverPreference, Observed, RoutableRequest, Route
from router.router import Refusal, Router
from router.settings import RouterSettings
from tests.fakes import candidate

FACTS = EngineFacts(
    block_size=16,
    num_blocks=10_000,
    context_length=100_000,
    max_batch=4,
    max_step_tokens=2048,
    bytes_per_block=1000,
    vocab_size=9,
)
FLEETS = {
    "apart": {"prefill-1": Role.PREFILL, "prefill-2": Role.PREFILL, "decode-1": Role.DECODE},
    "alike": {"both-1": Role.BOTH, "both-2": Role.BOTH},
    "mixed": {"prefill-1": Role.PREFILL, "both-1": Role.BOTH, "both-2": Role.BOTH, "decode-1": Role.DECODE},
    "one of each": {"both-1": Role.BOTH, "decode-1": Role.DECODE},
}


def registration(name, role, mode=HandoverMode.PULL):
    endpoint = HandoverEndpoint(mode, name, "h", 1) if mode is not None else None
    return Registration(WorkerId(name), 1, role, "m", "h:1", "sim", FACTS, "", endpoint)


def router_of(workers, policy="headrace", **settings):
    router = Router(RouterSettings(**settings), load_policy(policy), rng=random.Random(0))
    for name, role in workers.items():
        router.worker_up(registration(name, role))
    return router


def request(name="r", *, tokens=20, preference=HandoverPreference.AUTO, **fields):
    blocks = np.array([], dtype=np.uint64)
    return RoutableRequest(RequestId(name), "m", blocks, tokens, 10, 1e9, handover=preference, **fields)


def routed(router, asked):
    router.submit(asked, now=0.0)
    (answer,) = router.dispatch(now=0.0)
    return answer


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_hands_over_when_it_must(policy, fleet):
    for tokens in (20, 8000):
        router = router_of(FLEETS[fleet], policy)
        for number in range(4):
            answer = routed(router, request(f"r{number}", tokens=tokens, preference=HandoverPreference.ALWAYS))
            assert isinstance(answer, Route)
            assert answer.prefill is not None
            assert answer.prefill != answer.decode
            assert answer.predicted.prefill_s > 0
            router.release(answer.request, Observed(), now=0.0)


@pytest.mark.parametrize("fleet", FLEETS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_hands_over_when_it_must_not(policy, fleet):
    for tokens in (20, 50_000):
        answer = routed(router_of(FLEETS[fleet], policy), request(tokens=tokens, preference=HandoverPreference.NEVER))
        assert isinstance(answer, Route)
        assert answer.prefill is None
        assert FLEETS[fleet][answer.decode].can_decode


def test_without_a_wish_the_policy_decides():
    router = router_of(FLEETS["apart"])
    assert routed(router, request("short")).prefill is None
    assert routed(router, request("long", tokens=50_000)).prefill is not None


@pytest.mark.parametrize(
    "fleet",
    [
        [registration("both-1", Role.BOTH)],
        [registration("decode-1", Role.DECODE), registration("decode-2", Role.DECODE)],
        [registration("prefill-1", Role.PREFILL, HandoverMode.PUSH), registration("decode-1", Role.DECODE)],
        [registration("prefill-1", Role.PREFILL, None), registration("decode-1", Role.DECODE, None)],
    ],
)
def test_a_fleet_that_cannot_hand_over_refuses_who_insists(fleet):
    router = Router()
    for each in fleet:
        router.worker_up(each)
    with pytest.raises(NoPair, match="'m'") as refused:
        router.submit(request(preference=HandoverPreference.ALWAYS), now=0.0)
    assert refused.value.code == "no_pair"
    assert "m" in router.preview(request("p", preference=HandoverPreference.ALWAYS), now=0.0).refused_because
    assert isinstance(routed(router, request("auto")), Route)


def test_who_waits_for_a_pair_is_told_when_the_last_one_breaks():
    router = router_of({"prefill-1": Role.PREFILL, "decode-1": Role.DECODE})
    busy = LoadReport(WorkerId("prefill-1"), 1, WorkerState.READY, 1, 0, 10**6, 1000, 0, 0, 0, 0)
    router.apply_load(busy, now=0.0)
    router.submit(request(preference=HandoverPreference.ALWAYS), now=0.0)
    assert router.dispatch(now=0.0) == []
    router.worker_down(WorkerId("prefill-1"))
    (answer,) = router.dispatch(now=1.0)
    assert isinstance(answer, Refusal)
    assert isinstance(answer.error, NoPair)


def test_a_pair_is_held_back_like_any_other_choice():
    """Alone, decode-1 would serve the short prompt at once; the pair's prefill worker is busy."""
    router = router_of({"prefill-1": Role.PREFILL, "decode-1": Role.DECODE})
    busy = LoadReport(WorkerId("prefill-1"), 1, WorkerState.READY, 1, 0, 50_000, 1000, 0, 0, 0, 0)
    router.apply_load(busy, now=0.0)
    router.submit(request(preference=HandoverPreference.ALWAYS), now=0.0)
    assert router.dispatch(now=0.0) == []
    assert "prefill-1" in router.explain(RequestId("r")).held_because
    router.apply_load(LoadReport(WorkerId("prefill-1"), 1, WorkerState.READY, 0, 0, 0, 1000, 0, 0, 0, 0), now=1.0)
    (answer,) = router.dispatch(now=1.0)
    assert (answer.prefill, answer.decode) == ("prefill-1", "decode-1")


def test_the_wish_is_part_of_the_explanation():
    router = router_of(FLEETS["apart"])
    answer = routed(router, request(preference=HandoverPreference.ALWAYS))
    explanation = router.explain(RequestId("r"))
    assert explanation.handover is HandoverPreference.ALWAYS
    assert all(option.prefill is not None for option in explanation.candidates)
    assert answer.num_candidates == len(explanation.candidates) == 2
    preview = router.preview(request("p", preference=HandoverPreference.NEVER), now=0.0)
    assert preview.handover is HandoverPreference.NEVER
    assert preview.chosen.prefill is None


class AloneAnyway:
    """A user's policy that knows nothing of options."""

    name = "alone"

    def choose(self, request, view):
        only = candidate(view.decode[0].worker)
        return Choice(chosen=only, candidates=(only,))


def test_a_users_policy_that_weighs_no_pair_is_given_the_best_one():
    router = Router(RouterSettings(), AloneAnyway(), shadow=AloneAnyway())
    for name, role in FLEETS["apart"].items():
        router.worker_up(registration(name, role))
    answer = routed(router, request(preference=HandoverPreference.ALWAYS))
    assert (answer.prefill is not None, answer.policy) == (True, "alone")
