"""Tables of what was measured: medians, the spread of the rounds, ratios of values of one round against SMG's."""

import statistics
from typing import Any

from loadtest.peers.gateways import BASE
from loadtest.peers.measure import COSTS, NEW, PER_REQUEST, PER_TOKEN, SHARED, WORKLOADS
from loadtest.written import grid

Result = dict[str, Any]
"""What `peers.json` holds."""
_COLUMNS = {
    PER_TOKEN: "µs per token, 256 x 64",
    PER_REQUEST: "µs per request, 64 clients, 1 token",
    SHARED: "8k prompt, shared",
    NEW: "8k prompt, new",
}


def tables(result: Result) -> list[str]:
    """Markdown: what it costs, what a client sees, the workloads of the public table, who is not in them."""
    parts = [_costs(result), _clients(result), _workloads(result)]
    if result["absent"]:
        parts.append("\n".join(f"- {name}: {why}" for name, why in result["absent"].items()))
    return parts


def values(result: Result, gateway: str, case: str, field: str = "cpu_us") -> list[float]:
    """Of each round; CPU is that of all processes of the gateway."""
    rows = result["gateways"].get(gateway, {}).get("rows", {}).get(case, [])
    return [row["cpu_us"]["gateway"] if field == "cpu_us" else row[field] for row in rows]


def ratio(result: Result, gateway: str, base: str, case: str, field: str = "cpu_us") -> float | None:
    """Median of the rounds' ratios; None: one of the two was not measured."""
    ours, theirs = values(result, gateway, case, field), values(result, base, case, field)
    pairs = [one / other for one, other in zip(ours, theirs, strict=False) if other]
    return statistics.median(pairs) if pairs else None


def added_ms(result: Result, gateway: str, point: str) -> float | None:
    """Median of the rounds' differences of `p50` or `p99`, through it less at the worker."""
    found = result["gateways"].get(gateway, {}).get("ttft_ms", {})
    pairs = zip(found.get(f"through {point}", []), found.get(f"alone {point}", []), strict=True)
    differences = [through - alone for through, alone in pairs]
    return statistics.median(differences) if differences else None


def spread(found: list[float]) -> str:
    """The median, and from the least to the most."""
    return f"{_figure(statistics.median(found))} ({_figure(min(found))} to {_figure(max(found))})"


def _costs(result: Result) -> str:
    head = ["gateway", *(_COLUMNS[case] for case in COSTS), "RSS / PSS, MB", "what it does"]
    lines = []
    for name, each in result["gateways"].items():
        cells = [_cost(result, name, case) for case in COSTS]
        memory = each["memory_mb"]
        lines.append([name, *cells, f"{memory['rss']:.0f} / {memory['pss']:.0f}", each["note"]])
    title = "CPU of the gateway's processes: median (least to most of the rounds), times SMG's of the same round."
    return f"{title}\n\n{grid(head, lines)}"


def _cost(result: Result, gateway: str, case: str) -> str:
    found = values(result, gateway, case)
    if not found:
        return _why_not(result, gateway, case)
    text = spread(found)
    times = ratio(result, gateway, BASE, case)
    return text if times is None or gateway == BASE else f"{text}, x {times:.2f}"


def _why_not(result: Result, gateway: str, case: str) -> str:
    refused = result["gateways"][gateway]["refused"].get(case, "")
    return f"not served ({refused[:40].strip()}…)" if refused else "-"


def _clients(result: Result) -> str:
    head = ["gateway", "TTFT added at one client, p50 / p99, ms", "TTFT p50 / p99 of 256 streams, ms", "gap p99, ms"]
    lines = []
    for name in result["gateways"]:
        added = " / ".join(_or_dash(added_ms(result, name, point), "{:.2f}") for point in ("p50", "p99"))
        crowd = [_median_of(result, name, PER_TOKEN, field) for field in ("ttft_p50_ms", "ttft_p99_ms", "gap_p99_ms")]
        lines.append([name, added, f"{crowd[0]} / {crowd[1]}", crowd[2]])
    return f"What clients see (medians of the rounds).\n\n{grid(head, lines)}"


def _workloads(result: Result) -> str:
    head = ["gateway", *WORKLOADS, "peak memory, MB", "until it answers, s"]
    lines = []
    for name, each in result["gateways"].items():
        cells = [_workload(result, name, case) for case in WORKLOADS]
        lines.append([name, *cells, f"{each['memory_mb']['peak']:.0f}", f"{each['start_s']:.1f}"])
    title = (
        "Ten clients, workers that answer at once, answers of eight tokens: p50 / p99 of whole answers, ms; requests "
        "a second. The load and the workers run on the same cores."
    )
    return f"{title}\n\n{grid(head, lines)}"


def _workload(result: Result, gateway: str, case: str) -> str:
    if not values(result, gateway, case, "whole_p50_ms"):
        return _why_not(result, gateway, case)
    fields = ("whole_p50_ms", "whole_p99_ms", "requests_per_s")
    p50, p99, rate = (statistics.median(values(result, gateway, case, field)) for field in fields)
    return f"{p50:.1f} / {p99:.1f}; {rate:,.0f}/s"


def _median_of(result: Result, gateway: str, case: str, field: str) -> str:
    found = values(result, gateway, case, field)
    return f"{statistics.median(found):.1f}" if found else "-"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
