import math
import random
import threading

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planes.wire.blocks import pack
from planes.wire.messages import (
    BlocksStored,
    EngineFacts,
    HandoverEndpoint,
    HandoverMode,
    KvEvents,
    LoadReport,
    Registration,
    RequestBound,
    RequestId,
    RequestPrefilled,
    RequestReleased,
    Role,
    Snapshot,
    WorkerId,
    WorkerState,
)
from router.errors import DeadlineExceeded, DuplicateRequest, NoWorker, PolicyFailed, QueueFull, SloMissed
from router.policies.headrace import Headrace
from router.policies.least_loaded import LeastLoaded
from router.policies.round_robin import RoundRobin
from router.policy import Choice
from router.request import Failure, HandoverPreference, Observed, Outcome, RoutableRequest, Route, Sacrifice, SloSource
from router.router import Refusal, Router
from router.settings import ModelSlos, RouterSettings
from tests.fakes import candidate

FACTS = EngineFacts(
    block_size=16,
    num_blocks=10_000,
    context_length=100_000,
    max_batch=64,
    max_step_tokens=2048,
    bytes_per_block=1000,
    vocab_size=9,
)


def registration(
    name, role=Role.BOTH, *, epoch=1, model="m", state=WorkerState.READY, mode=HandoverMode.PULL, facts=FACTS
):
    endpoint = HandoverEndpoint(mode, f"{name}{epoch}", "h", 1)
    return Registration(WorkerId(name), epoch, role, model, "h:1", "sim", facts, "", endpoint, state)


def report(name, *, tokens=0, running=0, epoch=1):
    return LoadReport(WorkerId(name), epoch, WorkerState.READY, running, 0, tokens, 10_000, 0, 0, 0, 0)


def request(name, *, tokens=8000, blocks=(), expected=10, deadline=1e9, model="m", **fields):
    names = np.array(blocks, dtype=np.uint64)
    return RoutableRequest(RequestId(name), model, names, tokens, expected, deadline, **fields)


def router_of(*registrations, policy=None, shadow=None, **limits):
    router = Router(RouterSettings(**limits), policy, shadow=shadow, rng=random.Random(0))
    for each in registrations:
        router.worker_up(each)
    return router


def split(prefill=1, decode=1):
    workers = [registration(f"p{k}", Role.PREFILL) for k in range(prefill)]
    return workers + [registration(f"d{k}", Role.DECODE) for k in range(decode)]


def send(router, name, *, now=0.0, **fields):
    router.submit(request(name, **fields), now=now)
    return router.dispatch(now=now)


def test_an_idle_fleet_binds_at_once_and_the_reservation_balances():
    router = router_of(*split())
    (route,) = send(router, "r")
    assert isinstance(route, Route)
    assert (route.policy, route.held_s) == ("headrace", 0.0)
    assert router.stats(now=0.0).bound == 1
    router.prefilled(RequestId("r"), now=1.0)
    router.release(RequestId("r"), Observed(), now=2.0)
    assert router.stats(now=2.0).bound == 0
    with pytest.raises(KeyError):
        router.release(RequestId("r"), Observed(), now=2.0)


def test_a_busy_worker_gets_its_next_request_when_it_has_room():
    router = router_of(registration("b"))
    (first,) = send(router, "first")
    assert send(router, "second", now=0.1) == []
    assert router.stats(now=0.1).waiting == {0: 1}
    wakeup = router.wakeup()
    assert wakeup == pytest.approx(min(0.6, 0.1 + first.predicted.prefill_s), abs=0.2)
    router.prefilled(RequestId("first"), now=1.2)
    (second,) = router.dispatch(now=1.2)
    assert (second.request, second.held_s) == ("second", pytest.approx(1.1))
    explanation = router.explain(RequestId("second"))
    assert "b has" in explanation.held_because
    assert router.stats(now=1.2).held == 1
    assert router.wakeup() is None


def shortest_first(max_step_tokens=128, is_shortest_first=True):
    return replace(FACTS, max_step_tokens=max_step_tokens, is_shortest_first=is_shortest_first)


def test_a_short_prompt_is_not_held_where_it_would_pass_those_that_are_computed():
    router = router_of(registration("b", facts=shortest_first()))
    send(router, "long")
    assert send(router, "another", now=0.05, tokens=8000) == []
    (chat,) = send(router, "chat", now=1.0, tokens=100)  # "another" has waited so long that it comes first
    assert (chat.request, chat.held_s) == ("chat", 0.0)
    assert chat.predicted.ttft_s < 0.1
    assert send(router, "next", now=1.0, tokens=100) == []  # not shorter than the one before: it comes after it
    router.prefilled(RequestId("chat"), now=1.1)
    (second,) = router.dispatch(now=1.1)
    assert (second.request, second.held_s) == ("next", pytest.approx(0.1))


def test_a_short_prompt_that_lacks_room_to_decode_is_asked_about_once_for_each_change():
    facts = replace(shortest_first(), max_batch=1)
    router = router_of(registration("b", facts=facts))
    send(router, "long", expected=4000)
    for number in range(20):
        assert send(router, f"chat-{number}", now=0.1, tokens=100, expected=900) == []
    assert router.wakeup() > 0.1  # it does not ask again and again


def test_who_passes_others_is_not_refused_for_those_that_wait():
    router = router_of(registration("b", facts=shortest_first()), slo_ttft_s=2.5)
    send(router, "long")
    router.submit(request("another", slo_ttft_s=60.0), now=0.05)
    router.submit(request("a third", slo_ttft_s=60.0), now=0.06)
    assert router.dispatch(now=0.06) == []
    (chat,) = send(router, "chat", now=0.1, tokens=7000)
    assert chat.request == "chat"


@pytest.mark.parametrize("facts", [shortest_first(is_shortest_first=False), shortest_first(max_step_tokens=100_000)])
def test_a_short_prompt_is_held_where_it_would_pass_nobody(facts):
    router = router_of(registration("b", facts=facts))
    send(router, "long")
    assert send(router, "chat", now=0.1, tokens=100) == []


def test_a_request_waits_for_the_worker_that_holds_its_prefix_if_that_is_sooner():
    router = router_of(*split(prefill=2))
    names = np.arange(1, 501, dtype=np.uint64)
    router.apply_events(KvEvents(WorkerId("p0"), 1, 1, [BlocksStored(pack(names))]))
    router.apply_load(report("d0", running=30), now=0.0)
    router.apply_load(report("p0", tokens=2400), now=0.0)
    assert send(router, "r", tokens=8005, blocks=names) == []
    (route,) = router.dispatch(now=0.35)
    assert (route.prefill, route.cached_tokens) == ("p0", 8000)


def test_a_request_does_not_queue_for_a_hot_worker_behind_others_while_one_is_idle():
    router = router_of(*split(prefill=2))
    names = np.arange(1, 251, dtype=np.uint64)
    router.apply_events(KvEvents(WorkerId("p0"), 1, 1, [BlocksStored(pack(names))]))
    router.apply_load(report("d0", running=100), now=0.0)
    router.apply_load(report("p0", tokens=2400), now=0.0)
    for k in range(10):
        router.submit(request(f"r{k}", tokens=8000 + k, blocks=names), now=0.0)
    routes = router.dispatch(now=0.0)
    assert {route.prefill for route in routes} == {"p1"}


def test_a_worker_with_streams_computes_too_when_all_wait_for_one_without_any():
    """A prompt there costs its streams more than waiting for the other costs that request, but not all who wait."""
    facts = replace(FACTS, max_batch=2048, max_step_tokens=8192)
    router = router_of(registration("calm", facts=facts), registration("busy", facts=facts))
    router.apply_load(report("busy", running=600), now=0.0)
    for number in range(1500):
        router.submit(request(f"r{number}", tokens=200, expected=100), now=0.0)
    bound = [each for step in range(60) for each in router.dispatch(now=step / 100)]
    assert {each.prefill or each.decode for each in bound} == {"calm", "busy"}


def test_peers_policies_bind_at_once_with_honest_seconds():
    router = router_of(*split(2, 2), policy=LeastLoaded())
    routes = [route for k in range(6) for route in send(router, f"r{k}")]
    assert len(routes) == 6
    assert all(route.predicted.prefill_s > 0.5 for route in routes)
    assert routes[-1].predicted.queue_s > 1.0
    assert router.stats(now=0.0).decisions == {"least_loaded": 6}


def test_a_pair_that_cannot_hand_over_is_served_locally_whatever_the_policy_says():
    push = registration("p", Role.PREFILL, mode=HandoverMode.PUSH)
    router = router_of(push, registration("d", Role.DECODE), policy=RoundRobin())
    (route,) = send(router, "r")
    assert (route.prefill, route.decode) == (None, "d")


def test_the_queue_has_a_limit_and_says_when_to_come_back():
    router = router_of(registration("b"), queue_limit=2)
    send(router, "first")
    for name in ("second", "third"):
        send(router, name)
    with pytest.raises(QueueFull, match="2 requests are waiting and the limit is 2") as refused:
        router.submit(request("fourth"), now=0.0)
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after_s >= 1.0
    assert router.stats(now=0.0).refusals == {"queue_full": 1}


def test_a_prediction_beyond_the_slo_is_refused_before_any_prefill():
    router = router_of(registration("b"), slo_ttft_s=2.0)
    send(router, "first")
    with pytest.raises(SloMissed) as refused:
        router.submit(request("second", tokens=8000), now=0.0)
    assert 0 < refused.value.retry_after_s < 1.5
    router.submit(request("second", slo_ttft_s=9.0), now=0.0)
    with pytest.raises(SloMissed) as refused:
        router.submit(request("huge", tokens=60_000), now=0.0)
    assert refused.value.retry_after_s is None
    assert "shorter prompt" in router.explain(RequestId("huge")).refused_because


@pytest.mark.parametrize("by_request", [False, True])
def test_what_a_worker_has_begun_goes_on_late_rather_than_not(by_request):
    router = router_of(registration("b"), slo_ttft_s=None if by_request else 2.0)
    own = {"slo_ttft_s": 2.0} if by_request else {}
    send(router, "first")
    with pytest.raises(SloMissed):
        router.submit(request("new", **own), now=0.0)
    assert router.preview(request("begun", is_retry=True, **own), now=0.0).refused_because == ""
    assert send(router, "begun", is_retry=True, **own) == []
    router.prefilled(RequestId("first"), now=3.0)
    (route,) = router.dispatch(now=3.0)
    assert route.held_s == 3.0
    assert router.explain(RequestId("begun")).slo_ttft_s == 2.0  # which still says when it is due


def test_waiting_the_retry_after_helps():
    router = router_of(registration("b"), slo_ttft_s=2.0)
    send(router, "first")
    with pytest.raises(SloMissed) as refused:
        router.submit(request("second"), now=0.0)
    later = refused.value.retry_after_s + 0.01
    router.submit(request("second"), now=later)


class Counting(random.Random):
    """Tells how often a tie was broken."""

    ties = 0

    def choice(self, options):
        self.ties += 1
        return super().choice(options)


def with_slo_submitted(rng):
    router = Router(RouterSettings(slo_ttft_s=60.0), rng=rng)
    for name in "ab":
        router.worker_up(registration(name))
    router.submit(request("r"), now=0.0)
    return router


def test_a_request_with_an_slo_is_decided_once():
    rng = Counting(0)
    router = with_slo_submitted(rng)
    assert len(router.dispatch(now=0.001)) == 1
    assert rng.ties == 1


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (lambda router, name: router.worker_down(name), 0.0),
        (lambda router, name: router.worker_up(registration(name, state=WorkerState.DRAINING)), 0.0),
        (lambda router, name: router.apply_load(report(name, tokens=100_000), now=0.0), 0.0),
        (lambda router, name: router.configure(RouterSettings(slo_ttft_s=60.0), Headrace()), 0.0),
        (lambda router, name: None, 1.0),
    ],
    ids=["gone", "draining", "busy", "policy", "time"],
)
def test_what_was_decided_for_an_slo_is_decided_anew_when_anything_has_changed(change, now):
    (expected,) = with_slo_submitted(random.Random(0)).dispatch(now=0.0)
    rng = Counting(0)
    router = with_slo_submitted(rng)
    change(router, expected.decode)
    (route,) = router.dispatch(now=now)
    assert route.decode != expected.decode or rng.ties == 2


def test_a_request_that_has_waited_past_its_slo_is_refused_rather_than_started():
    router = router_of(registration("b"))
    send(router, "first")
    assert send(router, "second", slo_ttft_s=3.0) == []
    router.prefilled(RequestId("first"), now=2.5)
    (refusal,) = router.dispatch(now=2.5)
    assert isinstance(refusal, Refusal)
    assert isinstance(refusal.error, SloMissed)


def test_no_worker_is_a_503():
    router = router_of(registration("p", Role.PREFILL), registration("x", model="other"))
    with pytest.raises(NoWorker, match="none of 2 registered") as refused:
        router.submit(request("r"), now=0.0)
    assert refused.value.code == "no_worker"


def test_waiting_requests_are_refused_when_the_last_worker_leaves():
    router = router_of(registration("b"))
    send(router, "first")
    assert send(router, "second") == []
    router.worker_down(WorkerId("b"))
    (refusal,) = router.dispatch(now=1.0)
    assert isinstance(refusal.error, NoWorker)
    router.release(RequestId("first"), Observed(outcome=Outcome.INTERRUPTED), now=1.0)
    assert router.stats(now=1.0).bound == 0


def test_a_deadline_that_passes_in_the_queue_is_told():
    router = router_of(registration("b"))
    send(router, "first")
    assert send(router, "second", deadline=0.3) == []
    assert router.wakeup() == 0.3
    (refusal,) = router.dispatch(now=0.3)
    assert isinstance(refusal.error, DeadlineExceeded)
    assert refusal.error.code == "deadline"


def test_one_id_cannot_be_live_twice():
    router = router_of(registration("b"))
    send(router, "r")
    with pytest.raises(DuplicateRequest):
        router.submit(request("r"), now=0.0)


def test_a_withdrawn_request_is_never_bound():
    router = router_of(registration("b"))
    send(router, "first")
    send(router, "second")
    router.withdraw(RequestId("second"), now=0.5)
    router.withdraw(RequestId("unknown"), now=0.5)
    router.prefilled(RequestId("first"), now=2.0)
    assert router.dispatch(now=2.0) == []


def test_draining_workers_get_nothing_new():
    router = router_of(registration("a"), registration("b", state=WorkerState.DRAINING))
    (route,) = send(router, "r")
    assert route.decode == "a"


def test_policy_and_settings_change_without_losing_a_request():
    router = router_of(registration("b"))
    send(router, "first")
    assert send(router, "second") == []
    router.configure(RouterSettings(queue_limit=1), RoundRobin())
    (route,) = router.dispatch(now=0.1)
    assert (route.request, route.policy) == ("second", "round_robin")


def test_those_bound_without_a_handover_are_counted():
    router = router_of(*split())
    (short,) = send(router, "short", tokens=20)
    assert (short.prefill, router.stats(now=0.0).local_decisions) == (None, 1)
    (long,) = send(router, "long", tokens=50_000)
    assert (long.prefill, router.stats(now=0.0).local_decisions) == ("p0", 1)
    assert router.stats(now=0.0).decisions == {"headrace": 2}


def test_a_shadow_decides_and_is_not_obeyed():
    router = router_of(*split(3, 1), policy=LeastLoaded(), shadow=RoundRobin())
    for k in range(12):
        send(router, f"r{k}", tokens=1000 * (k % 3 + 1))
    shadow = router.stats(now=0.0).shadow
    assert (shadow.policy, shadow.decided) == ("round_robin", 12)
    assert 0 < shadow.differed < 12
    assert shadow.faster_s != 0.0
    assert router.explain(RequestId("r11")).shadow is not None
    router.configure(RouterSettings(), LeastLoaded())
    assert router.stats(now=0.0).shadow is None


class Broken:
    name = "broken"

    def choose(self, request, view):
        raise KeyError("mine")


def test_a_policy_that_raises_fails_its_request_and_nothing_else():
    router = router_of(*split(), policy=Broken())
    router.submit(request("r"), now=0.0)
    (refusal,) = router.dispatch(now=0.0)
    assert refusal.error.code == "policy_failed"
    assert "'broken' raised KeyError" in str(refusal.error)
    assert router.stats(now=0.0).bound == 0


def test_a_shadow_that_raises_does_no_harm():
    router = router_of(*split(), shadow=Broken())
    (route,) = send(router, "r")
    assert router.stats(now=0.0).shadow.failed == 1
    router.release(route.request, Observed(), now=1.0)
    assert router.stats(now=1.0).bound == 0


def test_explain_tells_what_was_predicted_and_what_happened_and_forgets_the_oldest():
    router = router_of(*split(), history=2)
    for k in range(3):
        (route,) = send(router, f"r{k}", now=k * 10.0)
        observed = Observed(ttft_s=1.5, completion_tokens=10)
        router.release(RequestId(f"r{k}"), observed, now=k * 10.0 + 5)
    assert router.explain(RequestId("r0")) is None
    explanation = router.explain(RequestId("r2"))
    assert explanation.chosen == route.predicted
    assert explanation.observed.ttft_s == 1.5
    assert len(explanation.candidates) == 2
    assert router.stats(now=30.0).ttft_error_ratio > 0


def test_explain_also_tells_of_the_attempts_before_the_last():
    router = router_of(registration("d0", Role.DECODE), registration("d1", Role.DECODE))
    (first,) = send(router, "r")
    lost = Observed(outcome=Outcome.INTERRUPTED, failure=Failure("worker_lost", first.decode, "killed"))
    router.release(RequestId("r"), lost, now=1.0)
    (second,) = send(router, "r", now=1.0, excluded=frozenset({first.decode}))
    explanation = router.explain(RequestId("r"))
    (before,) = explanation.earlier
    assert (before.chosen, before.observed) == (first.predicted, lost)
    assert (explanation.chosen, explanation.observed, explanation.attempt) == (second.predicted, None, 2)


def test_preview_changes_nothing():
    router = router_of(*split())
    explanation = router.preview(request("r"), now=0.0)
    assert explanation.chosen is not None
    assert router.explain(RequestId("r")) is None
    assert router.stats(now=0.0).decisions == {}
    assert router.wakeup() is None
    refused = router.preview(request("r", model="?"), now=0.0)
    assert "'?'" in refused.refused_because


def test_a_preview_has_the_slos_that_the_request_would_have():
    router = router_of(registration("b"), slo_ttft_s=2.0, slo_itl_s=0.05)
    send(router, "first")
    late = router.preview(request("r"), now=0.0)
    assert "the limit is 2 s" in late.refused_because
    assert (late.slo_ttft_s, late.slo_itl_s) == (2.0, 0.05)
    own = router.preview(request("r", slo_ttft_s=9.0, slo_itl_s=1e-6), now=0.0)
    assert own.refused_because == ""
    assert (own.slo_ttft_s, own.slo_itl_s) == (9.0, 1e-6)


@pytest.mark.parametrize(
    ("request_slos", "model", "gateway", "ttft", "itl"),
    [
        ({}, None, {}, (None, SloSource.NOBODY), (None, SloSource.NOBODY)),
        ({}, None, {"slo_ttft_s": 60.0}, (60.0, SloSource.GATEWAY), (None, SloSource.NOBODY)),
        (
            {},
            ModelSlos(slo_itl_s=0.02),
            {"slo_ttft_s": 60.0, "slo_itl_s": 0.05},
            (60.0, SloSource.GATEWAY),
            (0.02, SloSource.MODEL),
        ),
        (
            {"slo_ttft_s": 40.0, "slo_ttft_from": SloSource.KEY},
            ModelSlos(slo_ttft_s=50.0, slo_itl_s=0.02),
            {"slo_ttft_s": 60.0},
            (40.0, SloSource.KEY),
            (0.02, SloSource.MODEL),
        ),
        (
            {"slo_ttft_s": 30.0, "slo_itl_s": 0.01},
            ModelSlos(slo_ttft_s=50.0, slo_itl_s=0.02),
            {"slo_ttft_s": 60.0, "slo_itl_s": 0.05},
            (30.0, SloSource.REQUEST),
            (0.01, SloSource.REQUEST),
        ),
    ],
)
def test_a_request_goes_before_its_key_before_its_model_before_the_gateway(request_slos, model, gateway, ttft, itl):
    models = {"other": ModelSlos(slo_ttft_s=1e-6, slo_itl_s=1e-6)} | ({} if model is None else {"m": model})
    router = router_of(registration("b"), models=models, **gateway)
    send(router, "r", **request_slos)
    for told in (router.explain(RequestId("r")), router.preview(request("p", **request_slos), now=0.0)):
        assert (told.slo_ttft_s, told.slo_ttft_from) == ttft
        assert (told.slo_itl_s, told.slo_itl_from) == itl


def test_one_model_is_refused_late_answers_and_another_gets_them():
    router = router_of(
        registration("b"), registration("c", model="patient"), models={"m": ModelSlos(slo_ttft_s=2.0)}, slo_ttft_s=9.0
    )
    send(router, "first")
    send(router, "second", model="patient")
    with pytest.raises(SloMissed, match=r"the limit is 2 s"):
        router.submit(request("third"), now=0.0)
    router.submit(request("fourth", model="patient"), now=0.0)
    router.configure(RouterSettings(slo_ttft_s=9.0), Headrace())  # and so does the first, once nobody says so any more
    router.submit(request("third"), now=0.0)


def test_explain_tells_what_was_to_be_kept_and_what_every_way_gives_up():
    router = router_of(*split(), slo_itl_s=1e-6)
    (route,) = send(router, "r", slo_ttft_s=60.0)
    explanation = router.explain(RequestId("r"))
    assert (explanation.slo_ttft_s, explanation.slo_itl_s) == (60.0, 1e-6)
    told = msgspec.to_builtins(explanation)
    assert [way["gives_up"] for way in told["candidates"]] == [Sacrifice.ITL] * len(explanation.candidates)
    assert told["chosen"]["gives_up"] == route.predicted.gives_up == Sacrifice.ITL


@pytest.mark.parametrize("refuse_late", [True, False])
def test_a_request_that_is_late_is_refused_or_leaves_room_to_decode_to_those_in_time(refuse_late):
    router = router_of(*split(), refuse_late=refuse_late)
    router.apply_load(report("d0", running=100), now=0.0)
    slos = {"expected": 2000, "slo_ttft_s": 1.0, "slo_itl_s": 0.5}
    router.submit(request("late", tokens=800, **slos), now=0.0)
    answers = router.dispatch(now=5.0)
    if refuse_late:
        assert [type(answer.error) for answer in answers] == [SloMissed]
        return
    assert answers == []
    assert router.explain(RequestId("late")).held_because == "d0 has no room for it"
    (route,) = send(router, "in time", now=5.0, tokens=800, **slos)
    assert route.request == "in time"
    (route,) = router.dispatch(now=1.0 + 60.0 + 2000 * 0.5)
    assert route.request == "late"


def test_a_request_that_is_found_to_come_too_late_lets_others_go_first():
    router = router_of(registration("b0"), refuse_late=False)
    alone_s = router.preview(request("other", tokens=3000), now=0.0).chosen.prefill_s
    (first,) = send(router, "first", tokens=8000)
    ends_at = first.predicted.prefill_s
    router.submit(request("late", tokens=3000, slo_ttft_s=ends_at - 0.005 + alone_s), now=0.0)
    router.submit(request("in time", tokens=3000, slo_ttft_s=9.0), now=0.0)
    assert router.dispatch(now=0.5) == []
    now = ends_at - 0.008  # the worker takes the next one, which could be in time if it began at once
    assert [route.request for route in router.dispatch(now=now)] == ["in time"]
    late = router.explain(RequestId("late"))
    assert late.held_because == "it would be late; those that can be in time go first"
    assert router.wakeup() == now
    for name in ("first", "in time"):
        router.prefilled(RequestId(name), now=ends_at + alone_s)
    (route,) = router.dispatch(now=ends_at + alone_s)
    assert route.request == "late"


class InTurn:
    """A user's policy that remembers whom it named last."""

    name = "in turn"

    def __init__(self):
        self.last = [-1]

    def choose(self, request, view):
        self.last[0] = (self.last[0] + 1) % len(view.decode)
        only = candidate(view.decode[self.last[0]].worker)
        return Choice(chosen=only, candidates=(only,))


@pytest.mark.parametrize("policy", [RoundRobin, InTurn])
@pytest.mark.parametrize("slo_ttft_s", [None, 1e6])
def test_neither_a_preview_nor_an_slo_moves_a_policy_that_remembers(policy, slo_ttft_s):
    router = router_of(*(registration(f"b{k}") for k in range(3)), policy=policy(), slo_ttft_s=slo_ttft_s)
    served = []
    for number in range(6):
        assert router.preview(request("p"), now=0.0).chosen.decode == f"b{number % 3}"
        (answer,) = send(router, f"r{number}")
        served.append(answer.decode)
    assert served == ["b0", "b1", "b2"] * 2


def test_a_policy_that_lets_everybody_go_first_does_so_once_for_each():
    class Polite:
        name = "polite"

        def choose(self, request, view):
            only = candidate(view.decode[0].worker)
            return Choice(chosen=only, candidates=(only,), makes_way_because="after you")

    router = router_of(registration("b0"), policy=Polite(), refuse_late=False)
    for name in ("first", "second"):
        router.submit(request(name, slo_ttft_s=1e6), now=0.0)
    assert router.dispatch(now=0.0) == []
    assert router.explain(RequestId("first")).held_because == "after you"
    assert [route.request for route in router.dispatch(now=router.wakeup())] == ["first", "second"]


@pytest.mark.parametrize("policy", [RoundRobin, InTurn])
def test_a_policy_that_remembers_is_asked_once_about_those_who_come_too_late(policy):
    router = router_of(*(registration(f"b{k}") for k in range(3)), policy=policy(), refuse_late=False)
    for number in range(3):
        send(router, f"before{number}")
    for number in range(3):  # on an idle worker they would be in time
        router.submit(request(f"r{number}", tokens=3000, slo_ttft_s=1.0), now=0.0)
    assert [route.decode for route in router.dispatch(now=0.0)] == ["b0", "b1", "b2"]


def test_a_preview_of_a_policy_that_cannot_be_copied_says_so_and_does_not_ask_it():
    policy = InTurn()
    vars(policy)["lock"] = threading.Lock()
    router = router_of(registration("b0"), registration("b1"), policy=policy)
    explanation = router.preview(request("p"), now=0.0)
    assert "'in turn' cannot be copied (TypeError)" in explanation.refused_because
    assert send(router, "r")[0].decode == "b0"


def test_an_slo_does_not_change_how_ties_are_broken():
    def served(slo_ttft_s):
        router = router_of(*(registration(f"b{k}") for k in range(8)), slo_ttft_s=slo_ttft_s)
        return [send(router, f"r{number}", tokens=100)[0].decode for number in range(8)]

    assert served(None) == served(1e6)


def test_answers_shorter_than_allowed_are_learned():
    router = router_of(registration("b"))
    for k in range(300):
        send(router, f"r{k}", now=k * 10.0, tokens=100, expected=1000)
        router.release(RequestId(f"r{k}"), Observed(completion_tokens=100), now=k * 10.0 + 5)
    asked = request("x", tokens=100, expected=1000)
    unlearned = router_of(registration("b")).preview(asked, now=4000.0).chosen
    previewed = router.preview(asked, now=4000.0).chosen
    (route,) = send(router, "x", now=4000.0, tokens=100, expected=1000)
    assert route.predicted.total_s == previewed.total_s < unlearned.total_s / 5


def test_who_may_have_several_tokens_has_a_seat_of_a_decode_worker_however_short_answers_were():
    router = router_of(*split())
    for k in range(300):
        send(router, f"r{k}", now=k * 10.0, expected=12_000)
        router.prefilled(RequestId(f"r{k}"), now=k * 10.0 + 2)
        router.release(RequestId(f"r{k}"), Observed(completion_tokens=150), now=k * 10.0 + 5)
    for max_tokens, worker in ((64, "d0"), (2, "d0"), (1, "p0")):
        (route,) = send(router, "x", now=4000.0, expected=max_tokens, handover=HandoverPreference.ALWAYS)
        assert (route.prefill, route.decode) == ("p0", "d0")
        assert [name for name, each in router._fleet.workers.items() if "x" in each.decoding] == [worker]
        router.release(RequestId("x"), Observed(outcome=Outcome.CANCELLED), now=4000.0)


def test_lengths_are_remembered_of_so_many_models_and_the_silent_ones_are_forgotten_first():
    router = Router()
    for number in range(1100):
        model = f"m{number}"
        router.worker_up(registration("b", epoch=number + 1, model=model))
        for name, learned in ((f"r{number}", model), (f"kept{number}", "m")):
            router.worker_up(registration("c", epoch=number + 1, model="m"))
            send(router, name, tokens=10, expected=100, model=learned)
            router.release(RequestId(name), Observed(completion_tokens=10), now=0.0)
    assert len(router._length_shares) == 1024
    assert router._length_shares["m"] < 0.2
    assert "m0" not in router._length_shares


def test_settings_that_change_also_change_the_order_of_those_that_wait():
    router = router_of(registration("b"), aging=4.0)
    send(router, "running")
    send(router, "long", now=86_400.0, tokens=20_000)
    send(router, "short", now=86_401.0, tokens=100)
    router.configure(RouterSettings(aging=0.1), Headrace())
    assert [waiting.request.request for waiting in router._queue.walk()] == ["short", "long"]


def test_snapshots_are_asked_for_until_they_come():
    router = router_of(registration("b"))
    names = np.arange(1, 5, dtype=np.uint64)
    router.apply_events(KvEvents(WorkerId("b"), 1, 2, [BlocksStored(pack(names))]))
    assert router.workers_to_snapshot() == ["b"]
    router.apply_snapshot(Snapshot(WorkerId("b"), 1, 2, pack(names)))
    assert router.workers_to_snapshot() == []
    assert router.workers(now=0.0)[0].indexed_blocks == 4


def test_two_gateways_do_not_herd():
    """Both see the same reports, and of each other's dispatches only what the reports tell."""
    workers = [registration(f"p{k}", Role.PREFILL) for k in range(6)] + [registration("d", Role.DECODE)]
    gateways = [router_of(*workers), router_of(*workers)]
    gateways[1] = Router(RouterSettings(), rng=random.Random(7))
    for each in workers:
        gateways[1].worker_up(each)
    backlog = dict.fromkeys([f"p{k}" for k in range(6)], 0)
    now = 0.0
    for step in range(60):
        now = step * 0.1
        for name, tokens in backlog.items():
            for gateway in gateways:
                gateway.apply_load(report(name, tokens=tokens), now=now)
        for number, gateway in enumerate(gateways):
            gateway.submit(request(f"{number}/{step}", tokens=1600), now=now)
            for route in gateway.dispatch(now=now):
                backlog[route.prefill or "p0"] += 1600
        assert max(backlog.values()) <= 3 * 1600
        backlog = {name: max(0, tokens - 800) for name, tokens in backlog.items()}
        for gateway in gateways:
            for request_id in [key for key in gateway._bound if int(key.split("/")[1]) < step - 2]:
                gateway.release(request_id, Observed(), now=now)


NAMES = st.sampled_from([f"w{k}" for k in range(4)])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    *["submit", "submit", "submit", "prefilled", "release", "withdraw"],
                    *["down", "up", "report", "configure", "peer", "peer ends", "peer is gone"],
                ]
            ),
            NAMES,
            st.integers(0, 40),
            st.integers(1, 9000),
        ),
        max_size=80,
    ),
    st.sampled_from([None, LeastLoaded, RoundRobin]),
)
def test_everything_balances_to_zero_after_any_history(history, policy):  # noqa: C901, PLR0912 - a branch a rule
    roles = {"w0": Role.PREFILL, "w1": Role.DECODE, "w2": Role.BOTH, "w3": Role.DECODE}
    router = router_of(*(registration(name, role) for name, role in roles.items()), policy=policy and policy())
    epochs = dict.fromkeys(roles, 1)
    submitted, bound, ended, now = set(), [], set(), 0.0

    def dispatch():
        for answer in router.dispatch(now=now):
            assert answer.request in submitted
            submitted.discard(answer.request)
            if isinstance(answer, Route):
                bound.append(answer.request)
            else:
                ended.add(answer.request)

    for number, (what, name, place, tokens) in enumerate(history):
        now += 0.05
        if what == "submit":
            deadline = now + 1.0 if place % 5 == 0 else 1e9
            try:
                router.submit(request(f"r{number}", tokens=tokens, deadline=deadline, priority=place % 3), now=now)
                submitted.add(f"r{number}")
            except NoWorker:
                pass
        elif what == "withdraw" and submitted:
            gone = sorted(submitted)[place % len(submitted)]
            router.withdraw(RequestId(gone), now=now)
            submitted.discard(gone)
        elif what == "prefilled" and bound:
            router.prefilled(bound[place % len(bound)], now=now)
        elif what == "release" and bound:
            router.release(bound.pop(place % len(bound)), Observed(completion_tokens=3), now=now)
        elif what == "down":
            router.worker_down(WorkerId(name))
        elif what == "up":
            epochs[name] += place % 2
            router.worker_up(registration(name, roles[name], epoch=epochs[name]))
        elif what == "report":
            router.apply_load(report(name, tokens=tokens, running=place, epoch=epochs[name]), now=now)
        elif what == "configure":
            router.configure(RouterSettings(), LeastLoaded())
        elif what == "peer":
            told = RequestBound(
                RequestId(f"p{place}"), None, WorkerId(name), tokens, tokens, 0, 9, 0.1, 1.0, place % 2 > 0
            )
            router.apply_news("g", [told], now=now)
        elif what == "peer ends":
            ending = RequestId(f"p{place}")
            router.apply_news("g", [RequestPrefilled(ending), RequestReleased(ending, 9)][place % 2 :], now=now)
        elif what == "peer is gone":
            router.forget_gateway("g", now=now)
        dispatch()
        stats = router.stats(now=now)
        assert stats.bound == len(bound)
        assert sum(stats.waiting.values()) == len(submitted)
    router.forget_gateway("g", now=now)
    for name, role in roles.items():
        router.worker_up(registration(name, role, epoch=epochs[name]))
    for _ in range(1000):
        for request_id in bound:
            router.release(request_id, Observed(), now=now)
        bound.clear()
        now += 1.0
        dispatch()
        if not submitted:
            break
    assert not submitted, "a request waits for ever though the fleet is idle"
    for request_id in bound:
        router.release(request_id, Observed(), now=now)
    now += 100.0
    for name in roles:
        router.apply_load(report(name, epoch=epochs[name]), now=now)
    assert router.wakeup() is None
    for status in router.workers(now=now):
        assert (status.num_running, status.num_waiting, status.waiting_prefill_tokens, status.kv_tokens) == (0, 0, 0, 0)
        assert (status.queue_s, status.free_blocks) == (0.0, 10_000)
    assert router._fleet._departed == {}
    assert len(router._fleet._untold) == 0


def test_it_is_known_how_many_requests_find_others_there():
    router = router_of(registration("b"), policy=LeastLoaded())
    for number in range(100):
        send(router, f"alone{number}")
        router.release(RequestId(f"alone{number}"), Observed(), now=0.0)
    assert router._found_busy == 0.0
    for number in range(100):
        send(router, f"beside{number}")
    assert router._found_busy > 0.99


def test_stats_tell_how_evenly_tenants_were_served():
    def fairness(served):
        router = router_of(registration("b"), policy=LeastLoaded())
        for second in range(40):
            now = float(second)
            send(router, f"loud {second}", tenant="loud", tokens=1000, now=now)
            send(router, f"quiet {second}", tenant="quiet", tokens=1000, now=now)
            for tenant in served:
                router.prefilled(RequestId(f"{tenant} {second}"), now=now)
        return router.stats(now=40.0).fairness

    assert fairness(("loud", "quiet")).mean_index == 1.0
    starved = fairness(("loud",))
    assert starved.mean_index == pytest.approx(0.5)
    assert starved.shortfall_tokens > 0
    assert starved.num_windows == 3  # in the first nobody had waited for a whole one


def test_a_request_that_ends_unserved_is_nobodys_lack():
    router = router_of(registration("b"), policy=LeastLoaded())
    send(router, "cancelled", tenant="quiet")
    send(router, "waits", tenant="quiet", now=0.0)
    router.release(RequestId("cancelled"), Observed(outcome=Outcome.CANCELLED), now=1.0)
    router.release(RequestId("waits"), Observed(outcome=Outcome.FAILED), now=2.0)
    for second in range(3, 30):
        send(router, f"{second}", tenant="loud", now=float(second))
        router.release(RequestId(f"{second}"), Observed(completion_tokens=1), now=float(second))
    assert router.stats(now=40.0).fairness.num_windows == 0


def test_a_stream_with_an_slo_that_comes_back_to_its_worker_is_bound_again():
    router = router_of(registration("w"))
    slo = {"tokens": 100, "slo_itl_s": 0.05}
    send(router, "beside", expected=50, **slo)
    for number in range(5):
        (route,) = send(router, "again", now=1.0 + number, expected=100, **slo)
        assert route.request == "again"
        if number % 2:
            router.prefilled(RequestId("again"), now=1.1 + number)
        router.release(RequestId("again"), Observed(outcome=Outcome.FAILED), now=1.5 + number)
    router.release(RequestId("beside"), Observed(outcome=Outcome.FINISHED, completion_tokens=50), now=9.0)
    assert router.stats(now=9.0).bound == 0


@pytest.mark.parametrize("reason", ["lacks_room", "spares_streams"])
def test_those_that_are_held_do_not_keep_the_walk_from_those_behind_them(reason):
    """However many workers report, each time asking about the first of those held anew."""

    class Holds:
        name = "holds"

        def choose(self, request, view):
            choice = Headrace().choose(request, view)
            if request.model == "other":
                return choice
            held = replace(choice.chosen, waits_for_room=WorkerId("w0") if reason == "lacks_room" else None)
            return replace(choice, chosen=held, is_held=True, held_because=reason, **{reason: True})

    workers = [registration(f"w{number}") for number in range(64)]
    router = router_of(*workers, registration("other", model="other"), policy=Holds())
    for number in range(12):
        router.submit(request(f"held{number}"), now=0.0)
    router.submit(request("behind", model="other"), now=0.0)
    bound = []
    for number in range(8):
        router.apply_load(report(f"w{number}"), now=number / 1000)
        bound += router.dispatch(now=number / 1000)
    assert [route.request for route in bound] == ["behind"]


@pytest.mark.parametrize("field", ["congestion_s", "shared_s"])
@pytest.mark.parametrize("odd", ["x", None, math.nan, -math.inf, -1.0])
def test_odd_seconds_of_a_candidate_that_nobody_is_shown_fail_their_request_alone(field, odd):
    class Odd:
        name = "odd"

        def choose(self, request, view):
            options = [candidate(worker.worker, total_s=0.1 + place) for place, worker in enumerate(view.decode)]
            options[-1] = replace(options[-1], **{field: odd})
            return Choice(chosen=options[0], candidates=tuple(options), is_held=True, held_because="x")

    router = router_of(*[registration(f"w{number}") for number in range(40)], policy=Odd())
    for number in range(3):
        router.submit(request(f"r{number}"), now=0.0)
    assert [type(answer.error) for answer in router.dispatch(now=0.0)] == [PolicyFailed] * 3
