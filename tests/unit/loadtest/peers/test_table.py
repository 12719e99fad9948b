from dataclasses import asdict

import pytest

from loadtest.closed_loop import Row
from loadtest.peers.gateways import BASE, GATEWAYS, POLICIES, headrace_name
from loadtest.peers.measure import COSTS, PER_REQUEST, PER_TOKEN, WORKLOADS
from loadtest.peers.table import added_ms, ratio, tables

OURS = headrace_name("headrace")


def row(cpu_us, **fields):
    given = {"case": "c", "per": "token", "count": 1, "seconds": 1.0, "ttft_p50_ms": 5.0, "ttft_p99_ms": 9.0}
    given |= {"gap_p50_ms": 1.0, "gap_p99_ms": 2.0, "whole_p50_ms": 1.5, "whole_p99_ms": 3.0, "requests_per_s": 4900.0}
    return asdict(Row(cpu_us={"gateway": cpu_us}, errors=0, error="", **(given | fields)))


def measured(cpu_us, **fields):
    memory = {"rss": 100.0, "pss": 90.0, "peak": 120.0}
    return {
        "rows": {PER_TOKEN: [row(each) for each in cpu_us]},
        "ttft_ms": {},
        "refused": {},
        "memory_mb": memory,
        "start_s": 1.0,
        "note": "",
    } | fields


def result(**gateways):
    return {"gateways": gateways, "absent": {}}


def test_ratios_are_of_one_round():
    """The machine was twice as slow in the second round."""
    found = result(**{BASE: measured([10.0, 20.0, 10.0]), OURS: measured([15.0, 30.0, 15.0])})
    assert ratio(found, OURS, BASE, PER_TOKEN) == 1.5
    assert "15.0 (15.0 to 30.0), x 1.50" in "\n".join(tables(found))


def test_without_the_base_there_are_figures_and_no_ratios():
    found = result(**{OURS: measured([15.0])})
    assert ratio(found, OURS, BASE, PER_TOKEN) is None
    assert ", x " not in tables(found)[0]


def test_what_a_gateway_does_not_serve_and_who_is_absent_stand_in_the_tables():
    found = result(**{BASE: measured([10.0], refused={PER_REQUEST: "no such route"})})
    found["absent"] = {"LiteLLM": "not installed: no wheel"}
    text = "\n".join(tables(found))
    assert "not served (no such route…)" in text
    assert "- LiteLLM: not installed: no wheel" in text


def test_added_latency_is_the_median_difference_to_the_worker_itself():
    through = {"through p50": [5.0, 9.0, 6.0], "alone p50": [4.0, 5.0, 4.0]}
    assert added_ms(result(**{OURS: measured([], ttft_ms=through)}), OURS, "p50") == 2.0
    assert added_ms(result(**{OURS: measured([])}), OURS, "p50") is None


@pytest.mark.parametrize("gateway", [each for each in GATEWAYS if each.installs], ids=lambda gateway: gateway.name)
def test_each_gateway_is_pinned_by_its_name(gateway):
    version = gateway.name.split(" ")[1]
    assert any(word.endswith(f"=={version}") for call in gateway.installs for word in call)


def test_the_names_are_distinct():
    names = [gateway.name for gateway in GATEWAYS] + [headrace_name(policy) for policy in POLICIES]
    assert len({*names, *COSTS, *WORKLOADS}) == len(names) + len(COSTS) + len(WORKLOADS)
