"""What the gateway measures, in one registry of its own. Per token nothing is counted: a request adds up at its end."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router.stats import RouterStats

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_OVERHEAD_BUCKETS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RequestSummary(Struct, frozen=True):
    """One ended request. `code`: `ok`, `cancelled`, or the code of its error. Seconds: None if never reached."""

    model: str
    code: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: float | None = None
    itl_s: float | None = None
    """Mean gap between two tokens."""
    prefill_s: float | None = None
    handover_s: float | None = None
    handover_bytes: int = 0
    overhead_s: float | None = None
    """What the gateway took itself, before the first worker was asked."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """One number read at the time of the scrape."""

    name: str
    help: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Total(Gauge):
    """One that never goes down: a counter, `_total` after its name."""


class Metrics:
    """All metrics of one gateway process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._by_model: defaultdict[str, _Totals] = defaultdict(_Totals)
        self._registry.register(_Ended(self._by_model))
        self._retries = Counter(
            "headrace_retries", "Legs that failed and were run elsewhere, by why.", ("code",), registry=self._registry
        )
        self._migrations = Counter(
            "headrace_migrations",
            "Begun answers continued on another worker, by why.",
            ("code",),
            registry=self._registry,
        )
        self._replacements = Counter(
            "headrace_replacement_waits",
            "Waits of begun answers for a worker as none was left: replaced, or gave_up if the answer ended first.",
            ("outcome",),
            registry=self._registry,
        )
        self._fallbacks = Counter(
            "headrace_fallbacks",
            "Requests that one worker served alone because a handover failed before their first token, by why.",
            ("code",),
            registry=self._registry,
        )
        self._bypasses = Counter(
            "headrace_prefill_queue_bypasses",
            "Prompts sent to a worker directly because the prefill queue could not take them, by why.",
            ("code",),
            registry=self._registry,
        )
        self._ignored = Counter(
            "headrace_ignored_fields",
            "Body fields that nobody here knows, of requests served.",
            registry=self._registry,
        )
        self._cut_off = Counter(
            "headrace_clients_cut_off", "Clients that read too slowly to be waited for.", registry=self._registry
        )
        self._connections_refused = Counter(
            "headrace_connections_refused",
            "Connections ended before a route had their request whole, by why: no time, no room, no HTTP.",
            ("code",),
            registry=self._registry,
        )
        self._loop_lag = Histogram(
            "headrace_loop_lag_seconds",
            "How late the event loop runs what is due.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
            registry=self._registry,
        )

    def ended(self, request: RequestSummary) -> None:
        self._by_model[request.model].add(request)

    def fields_ignored(self, count: int) -> None:
        self._ignored.inc(count)

    def retried(self, code: str, *, is_migration: bool) -> None:
        (self._migrations if is_migration else self._retries).labels(code).inc()

    def waited_for_worker(self, *, is_replaced: bool) -> None:
        self._replacements.labels("replaced" if is_replaced else "gave_up").inc()

    def fell_back(self, code: str) -> None:
        self._fallbacks.labels(code).inc()

    def queue_bypassed(self, code: str) -> None:
        self._bypasses.labels(code).inc()

    def client_cut_off(self) -> None:
        self._cut_off.inc()

    def connection_refused(self, code: str) -> None:
        self._connections_refused.labels(code).inc()

    def loop_lagged(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def watch(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        """Ask `gauges` at every scrape."""
        self._registry.register(_Gauges(gauges))

    @property
    def registry(self) -> CollectorRegistry:
        return self._registry

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


def router_gauges(stats: RouterStats) -> Iterator[Gauge]:
    """What the router counts of itself."""
    for priority, count in (stats.waiting or {0: 0}).items():
        yield Gauge("requests_waiting", "Requests in the gateway's queue.", count, (("priority", str(priority)),))
    yield Gauge("oldest_wait_seconds", "Age of the oldest request in the queue.", stats.oldest_wait_s)
    yield Gauge("requests_bound", "Requests that hold a reservation.", stats.bound)
    yield Gauge("peer_requests_bound", "Requests of other gateways that hold one, as they tell.", stats.peers_bound)
    yield Total("requests_held", "Requests ever held back for a worker with room.", stats.held)
    yield Gauge("index_blocks", "Blocks in the index, summed over workers.", stats.index_blocks)
    yield Gauge("index_pure_python", "1 if the block index was not compiled.", bool(stats.index_fallback))
    yield Gauge("inexact_workers", "Workers whose blocks need a snapshot.", stats.inexact_workers)
    yield Total("local_decisions", "Requests bound without a handover.", stats.local_decisions)
    for policy, count in stats.decisions.items():
        yield Total("decisions", "Requests bound.", count, (("policy", policy),))
    for code, count in stats.refusals.items():
        yield Total("refusals", "Requests refused by the router.", count, (("code", code),))
    yield Gauge(
        "fairness_index",
        "Jain's index of what tenants got of their even share in the last 10 s; 1: even, or no two of them asked.",
        stats.fairness.index,
    )
    yield Gauge(
        "fairness_shortfall_tokens",
        "Uncached prompt tokens that a tenant got less than its even share in the last 10 s, at most.",
        stats.fairness.shortfall_tokens,
    )
    yield Total("fairness_windows", "Times of 10 s in which several tenants asked.", stats.fairness.num_windows)
    for what, ratio in (
        ("prefill", stats.prefill_error_ratio),
        ("step", stats.step_error_ratio),
        ("handover", stats.handover_error_ratio),
        ("ttft", stats.ttft_error_ratio),
    ):
        yield Gauge("prediction_error_ratio", "Mean relative error of predictions.", ratio, (("of", what),))
    if stats.shadow is not None:
        label = (("policy", stats.shadow.policy),)
        yield Total("shadow_decided", "Decisions of the shadow policy.", stats.shadow.decided, label)
        yield Total("shadow_failed", "How often the shadow policy raised.", stats.shadow.failed, label)
        yield Total("shadow_differed", "Those with other workers.", stats.shadow.differed, label)
        yield Gauge("shadow_faster_seconds", "Predicted seconds they would have saved.", stats.shadow.faster_s, label)


class _Totals:
    """What one model's ended requests add up to.

    Added by one thread alone: prometheus_client's counters take a lock each time. And a bucket is found by bisection.
    """

    def __init__(self) -> None:
        self.codes: defaultdict[str, int] = defaultdict(int)
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = self.handover_bytes = 0
        self.ttft, self.itl = _Spread(_TTFT_BUCKETS), _Spread(_ITL_BUCKETS)
        self.prefill, self.handover = _Spread(_SECONDS_BUCKETS), _Spread(_SECONDS_BUCKETS)
        self.overhead = _Spread(_OVERHEAD_BUCKETS)

    def add(self, request: RequestSummary) -> None:
        self.codes[request.code] += 1
        self.prompt_tokens += request.prompt_tokens
        self.completion_tokens += request.completion_tokens
        self.cached_tokens += request.cached_tokens
        self.handover_bytes += request.handover_bytes
        for spread, seconds in (
            (self.ttft, request.ttft_s),
            (self.itl, request.itl_s),
            (self.prefill, request.prefill_s),
            (self.handover, request.handover_s),
            (self.overhead, request.overhead_s),
        ):
            if seconds is not None:
                spread.counts[bisect_left(spread.bounds, seconds)] += 1
                spread.sum += seconds


class _Spread:
    """counts: of the values up to each of `bounds` and above the one before, and of those above the last."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: each with all that is below."""
        return list(zip([*map(str, self.bounds), "+Inf"], accumulate(self.counts), strict=True))


_COUNTERS: Final = (
    ("prompt_tokens", "Prompt tokens of ended requests."),
    ("completion_tokens", "Generated tokens."),
    ("cached_tokens", "Prompt tokens that did not have to be computed."),
    ("handover_bytes", "KV cache bytes handed over."),
)
_HISTOGRAMS: Final = (
    ("ttft", "Arrival until the first token."),
    ("itl", "Mean gap between tokens, a request each."),
    ("prefill", "Computing the prompt, as its worker says."),
    ("handover", "Moving a KV cache, as its taker says."),
    ("overhead", "What the gateway took itself, before the first worker was asked."),
)


class _Ended(Collector):
    """The totals of ended requests, by model."""

    def __init__(self, totals: Mapping[str, _Totals]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "headrace_requests", "Ended requests, by how they ended.", labels=("model", "code")
        )
        for model, of_model in self._totals.items():
            for code, count in of_model.codes.items():
                requests.add_metric((model, code), count)
        yield requests
        for name, text in _COUNTERS:
            counter = CounterMetricFamily(f"headrace_{name}", text, labels=("model",))
            for model, of_model in self._totals.items():
                counter.add_metric((model,), getattr(of_model, name))
            yield counter
        for name, text in _HISTOGRAMS:
            histogram = HistogramMetricFamily(f"headrace_{name}_seconds", text, labels=("model",))
            for model, of_model in self._totals.items():
                spread: _Spread = getattr(of_model, name)
                if any(spread.counts):
                    histogram.add_metric((model,), spread.buckets(), spread.sum)
            yield histogram


class _Gauges:
    """prometheus_client's collector interface over a callable."""

    def __init__(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        """Nothing to say before the first scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for gauge in self._gauges():
            names = [name for name, _ in gauge.labels]
            kind = CounterMetricFamily if isinstance(gauge, Total) else GaugeMetricFamily
            family = families.setdefault(gauge.name, kind(f"headrace_{gauge.name}", gauge.help, labels=names))
            family.add_metric([value for _, value in gauge.labels], gauge.value)
        return families.values()
