import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.plan import __main__ as command
from loadtest.plan.trial import Fleet
from process.settings import run

ROOT = Path(__file__).parents[4]
SMALL = ["--requests", "120", "--rate", "6", "--jobs", "1"]


def ran(*flags):
    """Exit status: a command line's own end is an exception, ours is not."""
    try:
        return run(command.app, [*flags])
    except SystemExit as end:
        return end.code or 0


def test_a_plan_is_printed_explained_drawn_and_written(tmp_path, capsys):
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    assert ran(*SMALL, "--explain", "--json", str(out), "--png", str(picture)) == 0
    printed = capsys.readouterr()
    assert "*" in printed.out
    assert "hold the SLO" in printed.out
    assert "The next bottleneck" in printed.out
    assert "both: " in printed.err
    found = json.loads(out.read_text())
    assert {tuple(trial["fleet"].values()) for trial in found["trials"]} >= {(0, 0, 2)}
    assert found["settings"]["engine"]["block_size"] == 512
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_equal_seeds_give_equal_plans(tmp_path, capsys):
    for name in ("one", "two"):
        assert ran(*SMALL, "--json", str(tmp_path / name)) == 0
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()


def test_a_trace_is_planned_for(capsys):
    assert ran("--trace", "uniform", "--requests", "80", "--rate-scale", "0.5", "--jobs", "1") == 0
    assert "uniform: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--trace is None: either --trace or --rate says what the load is"),
        (["--trace", "uniform", "--rate", "3"], "either --trace or --rate"),
        (["--trace", "nothing"], "no trace 'nothing'"),
        (["--trace", "conversation", "--block-size", "48"], "--block-size is 48: for a trace it must divide 512"),
        (["--trace", "conversation", "--blocks", "100"], "a worker takes at most .* tokens of prompt, and"),
        (["--rate", "1", "--max-batch", "9000"], "--max-step-tokens is 2048: it must be at least --max-batch, 9000"),
        (["--rate", "0"], "rate"),
        (["--rate", "1e308"], "rate.*Must be <= 1000000"),
        (["--rate", "1e-9"], r"rate.*Must be >= 0\.001"),
        (["--rate", "1", "--step-ms", "1e300"], "step-ms.*Must be <= 60000"),
        (["--rate", "1", "--rate-scale", "3"], "--rate-scale is 3.0: it counts only with --trace"),
        (["--trace", "uniform", "--prompt-tokens", "5"], "--prompt-tokens is 5: it counts only without --trace"),
        (["--trace", "uniform", "--answer-tokens", "5"], "--answer-tokens is 5: it counts only without --trace"),
        (["--rate", "1", "--like-model", "sim"], "--like-model is 'sim': it counts only with --like"),
        (["--trace", ""], "no trace ''"),
        (["--rate", "1", "--blocks", "2"], "--prompt-tokens is 1500: a worker takes at most 1021; raise --blocks"),
        (
            ["--rate", "1", "--blocks", "2", "--prompt-tokens", "500"],
            "--blocks is 2 .* a worker takes at most 1021 tokens of prompt, and",
        ),
        (["--rate", "1", "--prompt-tokens", "1000000"], "--prompt-tokens is 1000000: a worker takes at most 199998"),
        (["--rate", "1", "--json", "/proc/none/plan.json"], "--json is '/proc/none': the folder /proc/none cannot be"),
        (["--rate", "1", "--json", "/"], "--json is '/': that is a folder"),
        (["--rate", "1", "--png", "/proc/none/plan.png"], "--png is '/proc/none'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(flags, words, capsys):
    status = ran(*flags)
    printed = capsys.readouterr()
    assert status != 0
    assert re.search(words, f"{status} {printed.err}")
    assert not printed.out, "it is found out before anything is tried"


def test_where_no_fleet_holds_the_slo_the_end_says_so(capsys):
    assert ran(*SMALL, "--slo-ttft-s", "0.01", "--max-workers", "1", "--explain") == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "no fleet of up to 1 workers holds the SLO; --explain says why"
    assert "No fleet of up to 1 workers holds the SLO. The nearest is 1 both: " in printed.out


def test_a_long_stay_makes_a_long_sample(capsys):
    assert ran("--rate", "4", "--answer-tokens", "2000", "--requests", "60", "--jobs", "1", "--max-workers", "1") == 1
    assert ", 240 requests; SLO" in capsys.readouterr().out


def test_each_fleet_is_tried_once():
    asked = []

    class Bench:
        def trial(self, fleet, on_progress, *, is_whole):
            on_progress(1, 2)
            asked.append((fleet, is_whole))
            return type("Found", (), {"holds": True})()

    trials = command.Trials(Bench(), most=2)
    assert trials.trial(Fleet(num_both=1)) is trials.trial(Fleet(num_both=1))
    trials.trial(Fleet(num_prefill=1, num_decode=1))
    assert asked == [(Fleet(num_both=1), False), (Fleet(num_prefill=1, num_decode=1), True)]


def test_a_trial_tells_how_far_it_is_every_few_seconds(capsys):
    now = 0.0
    tell = command.told(Fleet(num_both=3), lambda: now)
    for ended in range(1, 101):
        now += 0.125
        tell(ended, 100)
    assert capsys.readouterr().err.splitlines() == ["3 both: 40 of 100 requests …", "3 both: 80 of 100 requests …"]


def headrace(*flags, code="from app.cli.main import main; main()"):
    argv = [sys.executable, "-c", f"import sys; sys.argv[1:] = {list(flags)!r}\n{code}"]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_headrace_plan_explains_itself():
    done = headrace("plan", "--help")
    assert (done.returncode, "--slo-itl-ms" in done.stdout) == (0, True), done.stderr


def test_headrace_plan_says_what_is_missing_where_only_the_package_is_installed():
    done = headrace("plan", "--rate", "3", code="sys.modules['loadtest'] = None\nfrom app.cli.main import main; main()")
    assert done.returncode == 2
    assert "headrace plan needs the simulator in loadtest/" in done.stderr
