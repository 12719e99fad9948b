import random

import msgspec
import numpy as np
import pytest

from planes.wire.messages import (
    LoadReport,
    RequestBound,
    RequestId,
    RequestPrefilled,
    RequestReleased,
    WorkerId,
    WorkerState,
)
from router.request import Observed, RoutableRequest
from router.router import Router
from router.settings import RouterSettings
from tests.fakes import registration

W = WorkerId("both-1")


@pytest.fixture
def router():
    router = Router(RouterSettings(), rng=random.Random(0))
    router.worker_up(registration("both-1"))
    return router


def bound(name="r", *, prefill=None, decode=W, tokens=400, **fields):
    told = {"decode_cached_tokens": 0, "expected_tokens": 50, "slo_itl_s": 0.05, "due_in_s": 1.0, **fields}
    return RequestBound(RequestId(name), prefill, decode, tokens, tokens, **told)


def ours(name="r", *, deadline=1e9, **slos):
    return RoutableRequest(RequestId(name), "sim", np.zeros(0, dtype=np.uint64), 40, 8, deadline, **slos)


def seen(router, now=0.0):
    (worker,) = router.workers(now=now)
    return worker.num_running, worker.num_waiting, worker.kv_tokens


def view(router, now=0.0):
    (worker,) = router._fleet.view(ours("q"), {}, now, random.Random(0)).decode
    return worker


def test_another_gateways_prompt_and_stream_take_what_our_own_would(router):
    router.apply_news("g", [bound()], now=0.0)
    assert seen(router) == (1, 1, 400)
    assert view(router).queue_s > 0.0, "its prompt is computed first"
    assert view(router).stall_left_s < 50 * 0.05, "and its stream may not stand still for longer"
    router.apply_news("g", [RequestPrefilled(RequestId("r"))], now=0.1)
    assert seen(router, 0.1) == (1, 0, 400)
    router.apply_news("g", [RequestReleased(RequestId("r"), 50)], now=0.2)
    assert seen(router, 0.2) == (0, 0, 0)


def test_one_that_is_computed_already_has_no_prompt_here(router):
    router.apply_news("g", [bound(is_prefilled=True)], now=0.0)
    assert seen(router) == (1, 0, 400)


@pytest.mark.parametrize("told", [{"decode": WorkerId("x")}, {"prefill": WorkerId("x")}])
def test_one_on_a_worker_that_is_not_known_here_is_left_out(router, told):
    router.apply_news(
        "g", [bound(**told), RequestPrefilled(RequestId("r")), RequestReleased(RequestId("r"), 1)], now=0.0
    )
    assert seen(router) == (0, 0, 0)


def test_a_name_that_is_in_use_is_left_out(router):
    router.submit(ours(), now=0.0)
    router.dispatch(now=0.0)
    router.apply_news("g", [bound("r"), bound("s")], now=0.0)
    router.apply_news("h", [bound("s")], now=0.0)
    assert router.stats(now=0.0).peers_bound == 1
    router.apply_news("h", [RequestReleased(RequestId("s"), 1)], now=0.0)
    assert router.stats(now=0.0).peers_bound == 1, "that one is of another gateway"


def test_a_gateway_that_is_forgotten_leaves_nothing(router):
    router.apply_news("g", [bound("r"), bound("s", is_prefilled=True)], now=0.0)
    router.apply_news("h", [bound("t")], now=0.0)
    router.forget_gateway("g", now=0.5)
    router.forget_gateway("unheard of", now=0.5)
    assert seen(router, 0.5) == (1, 1, 400)


def test_what_is_bound_is_told_as_it_happens_and_as_a_whole(router):
    told = []
    router.watch_news(told.append)
    router.submit(ours(slo_ttft_s=2.0, slo_itl_s=0.1), now=5.0)
    router.dispatch(now=5.0)
    (first,) = told
    assert (first.request, first.prefill, first.decode) == ("r", None, W)
    assert (first.prompt_tokens, first.uncached_tokens, first.expected_tokens) == (40, 40, 8)
    assert (first.slo_itl_s, first.is_prefilled) == (0.1, False)
    assert 1.9 < first.due_in_s <= 2.0
    router.prefilled(RequestId("r"), now=6.0)
    router.prefilled(RequestId("r"), now=6.0)
    assert told[1:] == [RequestPrefilled(RequestId("r"))]
    (whole,) = router.all_bound(now=6.0)
    assert whole.is_prefilled
    assert whole.due_in_s == pytest.approx(first.due_in_s - 1.0)
    router.watch_news(None)


@pytest.mark.parametrize("told", [{"uncached_tokens": 401}, {"decode_cached_tokens": 401}])
def test_more_tokens_than_the_prompt_has_are_not_to_be_told(told):
    fields = {"uncached_tokens": 400, "decode_cached_tokens": 0} | told
    with pytest.raises(ValueError, match="the prompt's 400"):
        RequestBound(RequestId("r"), None, W, 400, expected_tokens=1, slo_itl_s=None, due_in_s=None, **fields)


def test_what_is_too_long_for_its_worker_is_cut(router):
    router.apply_news("g", [bound(tokens=1 << 48, expected_tokens=1 << 48)], now=0.0)
    assert seen(router) == (1, 1, 4096)
    assert view(router).queue_s < 60.0


def test_a_request_of_ours_takes_the_place_of_one_of_the_same_name(router):
    router.apply_news("g", [bound("r")], now=0.0)
    router.submit(ours(), now=9.0)
    assert router.dispatch(now=9.0)
    assert router.stats(now=9.0).peers_bound == 0
    router.apply_news("g", [RequestReleased(RequestId("r"), 1)], now=9.0)
    router.release(RequestId("r"), Observed(), now=9.0)
    assert seen(router, 9.0) == (0, 0, 0)
    worker = router._fleet.workers[W]
    assert (worker.unseen_prefill_tokens, worker.unseen_decodes, worker.expected_tokens) == (0, 0, 0)


def test_what_the_last_report_has_counted_is_not_counted_again(router):
    report = LoadReport(W, 1, WorkerState.READY, 2, 1, 300, 900, 240, 0, 0, 0)
    router.apply_load(report, now=5.0)
    router.apply_news("g", [bound("r", is_prefilled=True, age_s=3.0), bound("s", tokens=300, age_s=1.0)], now=5.1)
    (worker,) = router.workers(now=5.1)
    assert (worker.num_waiting, worker.waiting_prefill_tokens) == (1, 300)
    assert worker.num_running == 3, "the stream that was told, another one, and the answer to come"
    router.apply_news("g", [bound("new")], now=5.1)
    assert seen(router, 5.1)[1] == 2


@pytest.mark.parametrize("is_prefilled", [True, False])
def test_what_one_report_has_counted_the_next_one_does_not_take_off_once_more(router, is_prefilled):
    report = LoadReport(W, 1, WorkerState.READY, 1, 1, 400, 900, 400, 0, 0, 0)
    router.apply_load(report, now=5.0)
    router.apply_news("g", [bound("r", is_prefilled=is_prefilled, age_s=3.0)], now=5.1)
    router.apply_load(report, now=6.0)
    worker = router._fleet.workers[W]
    assert (worker.unseen_prefills, worker.unseen_prefill_tokens, worker.unseen_decodes) == (0, 0, 0)
    router.apply_news("g", [RequestReleased(RequestId("r"), 50)], now=6.1)
    router.apply_load(LoadReport(W, 1, WorkerState.READY, 0, 0, 0, 1000, 0, 0, 0, 0), now=7.0)
    assert (worker.unseen_decodes, worker.unseen_kv_tokens, worker.unseen_blocks) == (0, 0, 0)
    assert (worker.seen_tokens, worker.seen_prompt_tokens, worker.seen_s) == (0, 0, 0.0)


def test_a_stream_that_was_told_is_taken_off_the_unknown_ones_of_its_decode_worker_alone(router):
    other = WorkerId("both-2")
    router.worker_up(registration("both-2"))
    for worker in (W, other):
        router.apply_load(LoadReport(worker, 1, WorkerState.READY, 3, 0, 0, 900, 240, 0, 0, 0), now=5.0)
    router.apply_news("g", [bound("r", prefill=other, is_prefilled=True, age_s=3.0)], now=5.1)
    assert [router._fleet.workers[worker].num_streams for worker in (W, other)] == [3, 3]


def test_numbers_beyond_what_may_be_told_are_told_as_the_most(router):
    told = []
    router.watch_news(told.append)
    router.submit(ours(deadline=1e12, slo_ttft_s=1e9, slo_itl_s=1e9), now=0.0)
    router.dispatch(now=0.0)
    (news,) = told
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(news), type=RequestBound) == news
