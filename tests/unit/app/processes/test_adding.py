from app.metrics import Gauge, Metrics, RequestSummary, Total
from app.processes.adding import Kept, added_up, decoded, encoded, exposition, families, kept


def _process(num_requests, *gauges):
    metrics = Metrics()
    for _ in range(num_requests):
        metrics.ended(RequestSummary("sim", "ok", prompt_tokens=3, completion_tokens=4, ttft_s=0.02))
    metrics.watch(lambda: gauges)
    return decoded(encoded(families(metrics.registry)))


def _lines(*parts):
    return exposition(added_up(parts)).decode().splitlines()


def test_counters_and_histograms_are_added():
    lines = _lines(
        (1, _process(2, Total("decisions", "Bound.", 2, (("policy", "p"),)))),
        (2, _process(3, Total("decisions", "Bound.", 5, (("policy", "p"),)))),
    )
    assert 'headrace_requests_total{code="ok",model="sim"} 5.0' in lines
    assert 'headrace_completion_tokens_total{model="sim"} 20.0' in lines
    assert 'headrace_ttft_seconds_bucket{le="0.025",model="sim"} 5.0' in lines
    assert 'headrace_ttft_seconds_bucket{le="0.01",model="sim"} 0.0' in lines
    assert 'headrace_ttft_seconds_count{model="sim"} 5.0' in lines
    assert 'headrace_decisions_total{policy="p"} 7.0' in lines


def test_gauges_are_added_or_the_greatest_or_each_process_s_by_what_they_mean():
    def gauges(waiting, workers, fairness):
        return (
            Gauge("requests_waiting", "Waiting.", waiting, (("priority", "0"),)),
            Gauge("workers", "Workers.", workers, (("role", "both"), ("stream", "up"))),
            Gauge("index_pure_python", "Not compiled.", value=False),
            Gauge("fairness_index", "Jain's.", fairness),
        )

    lines = _lines((1, _process(0, *gauges(2, 3, 0.5))), (2, _process(0, *gauges(1, 4, 1.0))))
    assert 'headrace_requests_waiting{priority="0"} 3.0' in lines
    assert 'headrace_workers{role="both",stream="up"} 4.0' in lines
    assert "headrace_index_pure_python 0.0" in lines
    assert 'headrace_fairness_index{process="1"} 0.5' in lines
    assert 'headrace_fairness_index{process="2"} 1.0' in lines


def test_one_process_has_the_same_numbers_as_without_adding():
    metrics = Metrics()
    metrics.ended(RequestSummary("sim", "ok", ttft_s=0.02))
    assert exposition(added_up([(1, families(metrics.registry))])) == metrics.exposition()


def test_counters_go_on_where_the_process_before_was_told_last(tmp_path):
    path = tmp_path / "1.counters"
    assert kept(path) == []
    first = Kept(path, 1)
    first.told(_process(1))
    first.told(_process(4, Gauge("requests_waiting", "Waiting.", 7)))
    for _ in range(2):  # told again, it is not counted again
        told = Kept(path, 1)
        assert 'headrace_requests_total{code="ok",model="sim"} 4.0' in _lines((1, told.told(_process(0))))
    told.told(_process(2))
    assert 'headrace_requests_total{code="ok",model="sim"} 6.0' in _lines((1, kept(path)))
    assert not any("waiting" in line for line in _lines((1, kept(path))))


def test_counters_that_cannot_be_kept_are_told_all_the_same(tmp_path):
    told = Kept(tmp_path / "gone" / "1.counters", 1).told(_process(4))
    assert 'headrace_requests_total{code="ok",model="sim"} 4.0' in _lines((1, told))
