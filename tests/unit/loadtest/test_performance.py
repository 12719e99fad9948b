import json

import pytest

from loadtest.performance import DATA, PAGE, budget, page

BENCH = {
    "parts": {"handover, times NIXL's bare calls": 0.9},
    "open_streams": [{"count": 2000, "gap_ms": [5.0, 12.0], "gap_alone_ms": [5.0, 8.0]}],
}


def verdicts(data):
    return {(row.what, row.unit): row.verdict for row in budget(data)}


def test_the_page_is_what_its_data_say():
    assert PAGE.read_text() == page(json.loads(DATA.read_text())), "make performance writes it anew"


def test_every_row_of_the_budget_is_there_whatever_was_measured():
    assert set(verdicts({}).values()) == {"not measured"}
    assert len(verdicts({})) == len(verdicts({"bench": BENCH}))


@pytest.mark.parametrize(
    ("handover", "p99", "told"), [(0.9, 9.0, "reached"), (0.7, 12.0, "missed"), (0.8, 9.6, "reached")]
)
def test_a_target_is_reached_on_its_own_side(handover, p99, told):
    opened = [{"count": 2000, "gap_ms": [5.0, p99], "gap_alone_ms": [5.0, 8.0]}]
    data = {"bench": {"parts": {"handover, times NIXL's bare calls": handover}, "open_streams": opened}}
    assert verdicts(data)["handover bandwidth", "x NIXL's bare calls"] == told
    assert verdicts(data)["gap between tokens at 2,000 streams, p99", "x the workers' own"] == told
