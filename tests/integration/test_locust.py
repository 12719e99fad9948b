"""The locust tool against a simulated fleet: what it counts is what its workload has."""

import csv
import os
import subprocess
import sys

import pytest

from loadtest.stack import stack
from loadtest.workloads import load
from tests.up import ROOT

pytestmark = pytest.mark.integration
FAST = {"HEADRACE_SPEEDUP": "1000", "HEADRACE_SIM_ANSWER_TOKENS": "0", "HEADRACE_CONTEXT_LENGTH": "100000"}
"""A word of a prompt is several tokens of the simulated model, which are bytes."""


def ran(port, folder, *flags):
    """Rows of its CSV, by name."""
    argv = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--host", f"http://127.0.0.1:{port}"]
    argv += ["--headless", "--only-summary", "--csv", str(folder / "stats"), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_LOAD_")}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with (folder / "stats_stats.csv").open() as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


async def test_a_workload_is_sent_whole_and_users_chat_until_they_are_stopped(tmp_path):
    sessions = load("shared_prefix", block_size=64, seed=0).sessions[:3]
    turns = [turn for session in sessions for turn in session.turns]
    workload = ("--workload", "shared_prefix", "--sessions", "3", "--rate-scale", "10")
    short = ("--tokens", "5", "--slo-ttft-s", "0")
    async with stack("--engine", "sim", environment=FAST) as one:
        rows = ran(one.port, tmp_path, *workload, "--slo-ttft-s", "60", "--slo-itl-ms", "60000", "-t", "60s")
        late = ran(one.port, tmp_path, "-u", "2", "-t", "3s", "--stop-timeout", "20", *short)
    assert int(rows["chat: whole answer"]["Request Count"]) == len(turns)
    assert int(rows["chat: within SLOs"]["Request Count"]) == len(turns)
    assert "chat: beyond SLOs" not in rows
    assert int(rows["Aggregated"]["Failure Count"]) == 0
    assert int(late["chat: beyond SLOs"]["Request Count"]) == int(late["chat: first token"]["Request Count"]) > 0
    assert "chat: within SLOs" not in late
