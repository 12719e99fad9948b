import msgspec
import numpy as np
import pytest

from planes.wire.messages import RequestId, WorkerId
from router.load import LoadMeter, ModelLoad, since, together
from router.request import Observed, Outcome, RoutableRequest
from router.router import Router
from tests.fakes import registration

SIM = "sim"


def routable(name, prompt_tokens=1000, **fields):
    return RoutableRequest(RequestId(name), SIM, np.empty(0, np.uint64), prompt_tokens, 10, 1e9, **fields)


def ended(meter, *, tokens=11, cached=0, ttft_s=1.0, itl_s=0.02, waited_s=0.5, outcome=Outcome.FINISHED, **fields):
    request = routable("r", prompt_tokens=1000, **fields)
    meter.arrived(request)
    observed = Observed(ttft_s=ttft_s, cached_tokens=cached, completion_tokens=tokens, outcome=outcome)
    now = 100.0 + waited_s + ttft_s + itl_s * (tokens - 1)
    meter.released(request, observed, submitted_at=100.0, bound_at=100.0 + waited_s, now=now)


def test_an_answer_is_counted_with_what_its_prompt_and_its_tokens_took():
    meter = LoadMeter()
    ended(meter, cached=400)
    load = meter.read()[SIM]
    assert (load.arrived, load.arrived_tokens, load.ended, load.prompt_tokens) == (1, 1000, 1, 1000)
    assert (load.uncached_tokens, load.pairs) == (600, 600 * 700)
    assert (load.streams, load.stream_tokens, load.stream_kv_tokens) == (1, 10, 10 * 1005.5)
    assert load.stream_s == pytest.approx(0.2)
    assert load.attainment is None


def test_a_request_is_good_within_all_of_its_slos():
    meter = LoadMeter()
    for ttft_s, itl_s in ((1.4, 0.02), (1.6, 0.02), (1.4, 0.04)):
        ended(meter, ttft_s=ttft_s, itl_s=itl_s, slo_ttft_s=2.0, slo_itl_s=0.03)
    load = meter.read()[SIM]
    assert (load.judged, load.good, load.with_itl) == (3, 1, 3)
    assert load.slo_itl_s == pytest.approx(0.09)
    assert load.attainment == pytest.approx(1 / 3)


def test_what_is_refused_has_arrived_and_missed_its_slo():
    meter = LoadMeter()
    request = routable("r", slo_ttft_s=1.0)
    meter.arrived(request)
    meter.refused(request)
    load = meter.read()[SIM]
    assert (load.arrived, load.ended, load.attainment) == (1, 0, 0.0)


def test_a_request_that_is_tried_again_arrives_once():
    meter = LoadMeter()
    ended(meter, outcome=Outcome.INTERRUPTED, slo_ttft_s=2.0)
    ended(meter, is_retry=True, slo_ttft_s=2.0)
    load = meter.read()[SIM]
    assert (load.arrived, load.ended, load.judged) == (1, 1, 0)


def test_a_window_is_what_came_between_two_readings_and_gateways_add_up():
    meter = LoadMeter()
    ended(meter)
    before = meter.read()
    ended(meter)
    ended(meter)
    window = since(meter.read(), before)
    assert window[SIM].arrived == 2
    assert since(meter.read(), {})[SIM].arrived == 3
    assert together([window, window, {"other": ModelLoad(arrived=1)}])["other"].arrived == 1
    assert together([window, window])[SIM].stream_tokens == 40


def test_names_of_models_cannot_fill_the_memory():
    meter = LoadMeter()
    for number in range(3000):
        meter.arrived(msgspec.structs.replace(routable("r"), model=f"m{number}"))
    assert len(meter.read()) == 1024


def test_the_router_counts_what_it_is_asked():
    router = Router()
    router.worker_up(registration("w"))
    router.submit(routable("a"), now=0.0)
    router.dispatch(now=0.0)
    router.release(RequestId("a"), Observed(ttft_s=0.1, completion_tokens=3), now=1.0)
    load = router.loads()[SIM]
    assert (load.arrived, load.ended, load.stream_tokens) == (1, 1, 2)
    assert load.stream_s == pytest.approx(0.9)
    assert WorkerId("w") in {status.worker for status in router.workers(now=1.0)}
