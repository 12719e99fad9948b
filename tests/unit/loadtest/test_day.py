import pytest

from loadtest.day import Day, Kind, day, table
from loadtest.simulator.scenario import engine_facts
from loadtest.slo import Slo

FACTS = engine_facts(block_size=64, num_blocks=4000, link_gbps=100)


def test_a_kind_of_request_comes_most_at_its_hour_and_a_little_at_any():
    kind = Kind(1000, 10, most_per_s=10.0, peak_hour=22.0)
    assert kind.rate(22.0) == pytest.approx(10.0)
    assert kind.rate(1.0) == kind.rate(19.0) == pytest.approx(1.0 + 9.0 * 0.3454915), "midnight is no edge"
    assert kind.rate(10.0) == pytest.approx(1.0)


def test_the_morning_has_long_prompts_and_the_evening_long_answers():
    load = day(10.0, 0.2, block_size=64, seed=1)
    again = day(10.0, 0.2, block_size=64, seed=1)
    assert [each.start_s for each in load.sessions] == [each.start_s for each in again.sessions]
    turns = {
        hours: [session.turns[0] for session in load.sessions if hours[0] <= session.start_s / 10.0 < hours[1]]
        for hours in ((8, 12), (18, 22))
    }
    prompts = {hours: sum(turn.prompt_tokens for turn in own) / len(own) for hours, own in turns.items()}
    answers = {hours: sum(turn.completion_tokens for turn in own) / len(own) for hours, own in turns.items()}
    assert prompts[8, 12] > 3 * prompts[18, 22]
    assert answers[18, 22] > 2 * answers[8, 12]


def test_a_day_is_a_row_of_the_table():
    small = Day(FACTS, 2.0, 0.1, Slo(3.0, 0.025), 0)
    rows = [small.row((0, 0, 3, False)), small.row((0, 0, 3, True))]
    assert [row.fleet for row in rows] == ["3 both", "3 both, autorole"]
    assert all(0 <= row.goodput <= 1 and row.busy_worker_s < row.all_worker_s for row in rows)
    assert all(0 < row.spare_worker_s <= row.all_worker_s for row in rows)
    assert rows[0].num_changes == 0
    assert table(rows).count("\n") == 4
