"""What the gateway measures, in one registry of its own. Per token nothing is counted: a request adds up at its end."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

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
        self._requests = _Sums("headrace_requests", "Ended requests, by how they ended.", ("model", "code"))
        self._registry.register(self._requests)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._completion_tokens = self._counter("completion_tokens", "Generated tokens.")
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens that did not have to be computed.")
        self._handover_bytes = self._counter("handover_bytes", "KV cache bytes handed over.")
        self._ttft = self._histogram("ttft_seconds", "Arrival until the first token.", _TTFT_BUCKETS)
        self._itl = self._histogram("itl_seconds", "Mean gap between tokens, a request each.", _ITL_BUCKETS)
        self._prefill = self._histogram(
            "prefill_seconds", "Computing the prompt, as its worker says.", _SECONDS_BUCKETS
        )
        self._handover = self._histogram("handover_seconds", "Moving a KV cache, as its taker says.", _SECONDS_BUCKETS)
        self._overhead = self._histogram(
            "overhead_seconds", "What the gateway took itself, before the first worker was asked.", _OVERHEAD_BUCKETS
        )
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
            "Requests that were not handed over because their prefill failed, by why.",
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
        model = request.model
        by_model = (model,)
        self._requests.values[model, request.code] += 1
        self._prompt_tokens.values[by_model] += request.prompt_tokens
        self._completion_tokens.values[by_model] += request.completion_tokens
        self._cached_tokens.values[by_model] += request.cached_tokens
        self._handover_bytes.values[by_model] += request.handover_bytes
        for spread, seconds in (
            (self._ttft, request.ttft_s),
            (self._itl, request.itl_s),
            (self._prefill, request.prefill_s),
            (self._handover, request.handover_s),
            (self._overhead, request.overhead_s),
        ):
            if seconds is not None:
                spread.observe(model, seconds)

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

    def _counter(self, name: str, text: str) -> "_Sums":
        sums = _Sums(f"headrace_{name}", text, ("model",))
        self._registry.register(sums)
        return sums

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> "_Spread":
        spread = _Spread(f"headrace_{name}", text, bounds)
        self._registry.register(spread)
        return spread


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


class _Sums(Collector):
    """A counter, summed up by one thread alone: prometheus_client's takes a lock each time."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self.values: defaultdict[tuple[str, ...], float] = defaultdict(float)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return (family,)


class _Spread(Collector):
    """A histogram by model; as `_Sums`, and the bucket is found by bisection."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._names = [*map(str, bounds), "+Inf"]
        self._counts: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(self._names))
        self._sums: defaultdict[str, float] = defaultdict(float)

    def observe(self, model: str, value: float) -> None:
        self._counts[model][bisect_left(self._bounds, value)] += 1
        self._sums[model] += value

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=("model",))
        for model, counts in self._counts.items():
            buckets = list(zip(self._names, accumulate(counts), strict=True))
            family.add_metric((model,), buckets, self._sums[model])
        return (family,)


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
