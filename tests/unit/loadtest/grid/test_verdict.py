import msgspec
import pytest

from loadtest.grid.verdict import CellResult, table, verdict
from loadtest.report import summarise
from loadtest.simulator.records import Gaps, Result
from loadtest.slo import Slo

EMPTY = summarise(Result([], Gaps(), [], 1.0), load="", fleet="", policy="", slo=Slo())


def row(policy, goodput=0.9, per_s=10.0, itl=0.01):
    return msgspec.structs.replace(
        EMPTY, policy=policy, num_requests=400, goodput_share=goodput, requests_per_s=per_s, itl_p99_s=itl
    )


def cell(*rows, is_closed=False, name="7", values=None):
    values = {"load": 0.9} if values is None else values
    return CellResult(name, "a title", values, is_closed, Slo(), 1.0, list(rows), {each.policy: 1.0 for each in rows})


def losses(*rows, **more):
    return verdict(cell(*rows, **more)).losses


def test_within_two_percent_of_the_best_is_no_loss():
    assert losses(row("headrace", 0.885), row("random", 0.9), row("dynamo", 0.5)) == []
    assert losses(row("headrace", 0.88), row("random", 0.9), row("dynamo", 0.5)) == ["goodput"]


def test_the_lead_is_a_share_of_the_best_other_rules_figure():
    assert verdict(cell(row("headrace", 0.6), row("random", 0.5))).goodput_lead == pytest.approx(0.2)
    assert verdict(cell(row("headrace", 0.0), row("random", 0.0))).goodput_lead == 0.0
    assert verdict(cell(row("headrace", 0.1), row("random", 0.0))).goodput_lead == 1.0


def test_a_few_requests_decide_nothing():
    assert losses(row("headrace", 0.0), row("random", 2 / 400)) == []
    assert losses(row("headrace", 0.0), row("random", 3 / 400)) == ["goodput"]


def test_throughput_counts_where_clients_wait_for_answers():
    rows = row("headrace", per_s=9.7), row("random", per_s=10.0)
    assert losses(*rows) == []
    assert losses(*rows, is_closed=True) == ["throughput"]
    assert verdict(cell(*rows)).throughput_lead is None
    assert verdict(cell(*rows, is_closed=True)).lead == pytest.approx(-0.03)


def test_longer_gaps_are_a_loss_unless_goodput_is_higher_for_them():
    assert losses(row("headrace", itl=0.015), row("random", itl=0.01)) == []
    assert losses(row("headrace", itl=0.016), row("random", itl=0.01)) == ["ITL"]
    assert losses(row("headrace", 0.904, itl=0.016), row("random", itl=0.01)) == ["ITL"]  # by a few requests
    assert losses(row("headrace", 0.91, itl=0.016), row("random", itl=0.01)) == []
    assert losses(row("headrace", itl=None), row("random", itl=None)) == []


def test_short_gaps_of_a_rule_with_less_goodput_are_nothing_to_be_measured_by():
    assert losses(row("headrace", itl=0.05), row("random", 0.5, itl=0.01), row("dynamo", itl=0.04)) == []


def test_a_cell_without_headrace_has_no_verdict():
    with pytest.raises(ValueError, match=r"cell 7 was not served with headrace.*random"):
        verdict(cell(row("random")))


def test_the_table_has_the_worst_loss_on_top_and_no_cell_that_is_none():
    cells = [
        cell(row("headrace", 0.8), row("random"), name="1"),
        cell(row("headrace", 0.9), row("random"), name="2"),
        cell(row("headrace", 0.5), row("random"), name="bad", values={}),
        cell(row("headrace", per_s=9.0), row("random"), name="4", is_closed=True),
    ]
    text = table(cells)
    assert text.startswith("headrace is behind in 3 of 4 cells")
    assert text.index("goodput: cell bad\n") < text.index("goodput: cell 1 (") < text.index("throughput: cell 4 (")
    assert "cell 2 " not in text
    assert "goodput: first or within 2% of the best other rule in 2 of 4 cells (50.0%)" in text
    assert "throughput in a closed loop: first or within 2% of the best other rule in 0 of 1 cells" in text


def test_every_loss_shows_who_was_better_in_it():
    rows = row("headrace", itl=0.05), row("random", 0.95, itl=0.04), row("dynamo", itl=0.01), row("infera", per_s=99.0)
    text = table([cell(*rows, is_closed=True)])
    assert "goodput, throughput, ITL: cell 7" in text
    losses = text.split("\n\n")[1]
    assert all(name in losses for name in ("headrace", "random", "dynamo", "infera"))
