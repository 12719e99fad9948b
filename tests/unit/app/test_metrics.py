from dataclasses import replace

from app.metrics import Gauge, Metrics, RequestSummary, Total, router_gauges
from router.fairness import Fairness
from router.policies import load_policy
from router.router import Router


def exposed(metrics, start):
    return [line for line in metrics.exposition().decode().splitlines() if line.startswith(start)]


def test_a_request_adds_up_at_its_end():
    metrics = Metrics()
    metrics.ended(RequestSummary("m", "ok", 20, 3, 16, ttft_s=0.2, itl_s=0.01, prefill_s=0.1, handover_bytes=100))
    metrics.ended(RequestSummary("m", "deadline"))
    assert exposed(metrics, "headrace_requests_total") == [
        'headrace_requests_total{code="ok",model="m"} 1.0',
        'headrace_requests_total{code="deadline",model="m"} 1.0',
    ]
    assert exposed(metrics, "headrace_completion_tokens_total") == ['headrace_completion_tokens_total{model="m"} 3.0']
    assert exposed(metrics, "headrace_ttft_seconds_count") == ['headrace_ttft_seconds_count{model="m"} 1.0']
    assert exposed(metrics, "headrace_handover_seconds_count") == []


def test_times_are_counted_up_to_and_at_each_bound():
    metrics = Metrics()
    for seconds in (0.001, 0.0025, 0.003, 20.0, 31.0):
        metrics.ended(RequestSummary("m", "ok", prefill_s=seconds))
    counts = [line.rpartition(" ") for line in exposed(metrics, "headrace_prefill_seconds_bucket")]
    told = {name.partition('le="')[2].partition('"')[0]: float(count) for name, _, count in counts}
    assert (told["0.001"], told["0.0025"], told["0.005"], told["10.0"], told["30.0"], told["+Inf"]) == (
        1,
        2,
        3,
        3,
        4,
        5,
    )
    assert list(told.values()) == sorted(told.values())
    assert exposed(metrics, "headrace_prefill_seconds_sum") == ['headrace_prefill_seconds_sum{model="m"} 51.0065']
    assert exposed(metrics, "headrace_prefill_seconds_count") == ['headrace_prefill_seconds_count{model="m"} 5.0']


def test_retries_and_migrations_are_told_apart():
    metrics = Metrics()
    metrics.retried("worker_lost", is_migration=True)
    metrics.retried("worker_busy", is_migration=False)
    metrics.fell_back("worker_lost")
    metrics.client_cut_off()
    metrics.connection_refused("head_too_large")
    metrics.loop_lagged(0.02)
    assert exposed(metrics, "headrace_migrations_total") == ['headrace_migrations_total{code="worker_lost"} 1.0']
    assert exposed(metrics, "headrace_retries_total") == ['headrace_retries_total{code="worker_busy"} 1.0']
    assert exposed(metrics, "headrace_fallbacks_total") == ['headrace_fallbacks_total{code="worker_lost"} 1.0']
    assert exposed(metrics, "headrace_clients_cut_off_total") == ["headrace_clients_cut_off_total 1.0"]
    refused = ['headrace_connections_refused_total{code="head_too_large"} 1.0']
    assert exposed(metrics, "headrace_connections_refused_total") == refused


def test_gauges_are_asked_at_each_scrape():
    metrics, count = Metrics(), iter(range(10))
    metrics.watch(lambda: [Gauge("queue", "Waiting.", next(count)), Gauge("w", "W.", 2, (("role", "decode"),))])
    assert exposed(metrics, "headrace_queue") == ["headrace_queue 0.0"]
    assert exposed(metrics, "headrace_queue") == ["headrace_queue 1.0"]
    assert exposed(metrics, "headrace_w") == ['headrace_w{role="decode"} 2.0']


def test_what_only_grows_is_a_counter():
    metrics = Metrics()
    metrics.watch(lambda: [Total("taken", "Taken.", 3, (("code", code),)) for code in ("a", "b")])
    text = metrics.exposition().decode()
    assert "# TYPE headrace_taken_total counter" in text
    assert exposed(metrics, "headrace_taken") == [f'headrace_taken_total{{code="{code}"}} 3.0' for code in ("a", "b")]


def test_the_router_s_totals_are_counters_and_what_can_go_down_is_not():
    metrics, router = Metrics(), Router(shadow=load_policy("random"))
    metrics.watch(lambda: router_gauges(router.stats(now=0.0)))
    lines = exposed(metrics, "# TYPE headrace_")
    kinds = dict(line.removeprefix("# TYPE headrace_").split() for line in lines)
    for name in ("requests_held", "local_decisions", "shadow_decided", "shadow_failed", "shadow_differed"):
        assert kinds[f"{name}_total"] == "counter"
    for name in ("requests_waiting", "requests_bound", "index_blocks", "shadow_faster_seconds", "fairness_index"):
        assert kinds[name] == "gauge"


def test_who_is_served_unevenly_is_told_without_a_label_for_each_tenant():
    metrics, router = Metrics(), Router()
    stats = replace(router.stats(now=0.0), fairness=Fairness(0.5, 4000.0, 7, 0.75))
    metrics.watch(lambda: router_gauges(stats))
    assert exposed(metrics, "headrace_fairness_") == [
        "headrace_fairness_index 0.5",
        "headrace_fairness_shortfall_tokens 4000.0",
        "headrace_fairness_windows_total 7.0",
    ]


def test_two_gateways_in_one_process_share_nothing():
    one, other = Metrics(), Metrics()
    one.client_cut_off()
    assert exposed(other, "headrace_clients_cut_off_total") == ["headrace_clients_cut_off_total 0.0"]
