import subprocess

import pytest

from loadtest.peers.measure import PER_REQUEST, PER_TOKEN
from loadtest.peers.table import ratio
from loadtest.since import NOW, THROUGHPUT, installed, tables


def rows(rates=(), costs=()):
    rows = [{"requests_per_s": rate, "cpu_us": {"gateway": 1.0}} for rate in rates]
    return rows or [{"requests_per_s": 1.0, "cpu_us": {"gateway": cost}} for cost in costs]


RESULT = {
    "commit": "abc1234",
    "gateways": {
        "abc1234": {"rows": {THROUGHPUT: rows([100.0, 200.0, 400.0]), PER_REQUEST: rows(costs=[500.0, 400.0])}},
        NOW: {"rows": {THROUGHPUT: rows([150.0, 200.0, 1200.0]), PER_REQUEST: rows(costs=[250.0, 300.0])}},
    },
}


def test_ratios_are_of_values_of_one_round():
    assert ratio(RESULT, NOW, "abc1234", THROUGHPUT, "requests_per_s") == 1.5
    assert ratio(RESULT, NOW, "abc1234", PER_REQUEST) == pytest.approx(0.625)


def test_what_was_not_measured_has_no_ratio_and_no_line():
    assert ratio(RESULT, NOW, "abc1234", PER_TOKEN) is None
    (table,) = tables(RESULT)
    assert len(table.splitlines()) == 4
    assert "| 200 (100 to 400) | 200 (150 to 1,200) | 1.50 |" in table


def test_what_is_no_commit_is_named():
    with pytest.raises(SystemExit, match=r"git rev-parse --verify: .*"):
        installed("no such commit")


def test_the_commit_is_told_by_its_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *argv], check=True)
    name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
    wheel = tmp_path / "build" / "since" / name.strip() / "build" / "wheel"
    wheel.mkdir(parents=True)  # as it is left by an earlier run
    assert (installed("HEAD").commit, installed("HEAD").wheel) == (name.strip(), wheel)
