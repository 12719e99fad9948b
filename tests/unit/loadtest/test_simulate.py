import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from cyclopts import CycloptsError

from loadtest.progress import Progress
from loadtest.simulate import MATRIX, QUICK, Case, Comparison, app, write_docs
from loadtest.simulator.scenario import engine_facts
from loadtest.slo import Slo
from planes.wire.errors import UnusableSetting
from planes.wire.messages import LatencyPrior
from router.policies import POLICIES

FACTS = engine_facts(block_size=512, num_blocks=1000, link_gbps=100)
CASES = [Case("uniform", 2.0, 2, 1, limit=30), Case("uniform", 2.0, 0, 0, 3, limit=30)]


def compare(policies=("round_robin", "mooncake"), seed=1):
    comparison = Comparison(policies, FACTS, seed, Slo())
    return comparison.report(CASES, comparison.run(CASES))


def test_the_same_seed_gives_the_same_json(capsys):
    first, second, other = (msgspec.json.encode(compare(seed=seed)) for seed in (1, 1, 2))
    assert first == second != other
    assert "4 runs in" in capsys.readouterr().err


def test_every_case_and_policy_gets_a_row():
    rows = compare().rows
    assert [(row.fleet, row.policy) for row in rows] == [
        ("2 prefill + 1 decode", "round_robin"),
        ("2 prefill + 1 decode", "mooncake"),
        ("3 both", "round_robin"),
        ("3 both", "mooncake"),
    ]
    assert all(row.num_requests == row.num_finished == 30 for row in rows)


def test_every_policy_survives_a_run():
    assert [row.policy for row in compare(tuple(POLICIES)).rows] == [*POLICIES, *POLICIES]


def test_progress_tells_what_is_left(capsys):
    instants = iter([0.0, 0.0, 20.0, 20.0])
    progress = Progress(2, clock=lambda: next(instants))
    progress.start("a run")(5, 10)
    assert "25%  about 60 s left  a run: 5/10" in capsys.readouterr().err


def test_the_command_writes_json_and_a_page(tmp_path, capsys):
    arguments = shlex.split(
        "--trace uniform --policies random,dynamo --prefill 2 --decode 1 --rate-scale 1 2 --limit 20"
    )
    app(
        [*arguments, "--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "page")],
        result_action="return_value",
    )
    rows = msgspec.json.decode((tmp_path / "out.json").read_bytes())["rows"]
    assert [(row["load"], row["policy"]) for row in rows] == [
        ("uniform x1", "random"),
        ("uniform x1", "dynamo"),
        ("uniform x2", "random"),
        ("uniform x2", "dynamo"),
    ]
    assert "dynamo" in capsys.readouterr().out
    assert (tmp_path / "page" / "index.html").stat().st_size > 10_000


def test_an_engines_speed_comes_from_flags(tmp_path):
    flags = "--prefill-tokens-per-s 60000 --step-ms 4 --max-step-tokens 8192 --max-batch 64 --shortest-first"
    arguments = f"--trace uniform --both 1 --policies random --limit 3 {flags} --json {tmp_path}/out.json"
    app(shlex.split(arguments), result_action="return_value")
    engine = msgspec.json.decode((tmp_path / "out.json").read_bytes())["settings"]["engine"]
    assert (engine["max_step_tokens"], engine["max_batch"], engine["is_shortest_first"]) == (8192, 64, True)
    speed = engine["latency"]
    assert speed["prefill_per_token_s"] == pytest.approx(1 / 60_000)
    assert speed["prefill_per_pair_s"] / speed["prefill_per_token_s"] == pytest.approx(2e-9 * 8000)
    assert (speed["step_fixed_s"], speed["step_per_sequence_s"]) == (pytest.approx(0.004), pytest.approx(2.5e-5))


def test_without_flags_the_engine_is_the_standard_one():
    assert FACTS.latency == LatencyPrior(handover_bytes_per_s=12.5e9)


class Broken:
    """A policy."""

    name = "broken"

    def choose(self, request, view):
        raise KeyError("boom")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "nothing"], "policy is 'nothing'"),
        (["--policies", ","], "--policies is ','"),
        (["--trace", "nothing"], "no trace 'nothing'"),
        (["--prefill", "2"], "--prefill is 2: .* cannot decode"),
        (["--prefill", "-1", "--both", "2"], '"-1" for "?--prefill"?. Must be >= 0'),
        (["--block-size", "48", "--blocks", "10000"], "--block-size is 48: .* must divide 512"),
        (["--block-size", "0"], '"0" for "?--block-size"?. Must be >= 1'),
        (["--blocks", "1", "--trace", "uniform"], "--blocks is 1 and --block-size 512: .* at most 509 tokens"),
        (["--rate-scale", "1", "0"], r'"?--rate-scale"?. Must be >= 0\.001'),
        (["--rate-scale", "inf"], '"?--rate-scale"?. Must be <= 1000000'),
        (["--limit", "-3"], '"-3" for "?--limit"?. Must be >= 1'),
        (["--max-step-tokens", "64"], "--max-step-tokens is 64: it must be at least --max-batch, 128"),
        (["--step-ms", "0"], '"?--step-ms"?. Must be > 0'),
        (["--gateways", "0"], '"0" for "?--gateways"?. Must be >= 1'),
        (["--jobs", "0"], '"0" for "?--jobs"?. Must be >= 1'),
        (["--slow-worker", "0"], '"?--slow-worker"?. Must be > 0'),
        (["--kill-every", "0"], '"?--kill-every"?. Must be > 0'),
        (["--restart", "-1"], '"?--restart"?. Must be > 0'),
        (["--slow-worker", "nan"], '"?--slow-worker"?. Must be < inf'),
        (["--link-gbps", "0"], '"?--link-gbps"?. Must be > 0'),
        (["--slo-ttft", "-1"], '"?--slo-ttft"?. Must be > 0'),
        (
            ["--trace", "uniform", "--limit", "1", "--policies", "random", "--html", "/proc/none"],
            "--html is '/proc/none'",
        ),
        (["--json", "/"], "--json is '/': that is a folder"),
        (["--quick"], "--quick is True: it counts only with --matrix"),
        (["--matrix", "docs", "--trace", "uniform"], "--trace is 'uniform': it counts only without --matrix"),
        (["--like-model", "sim"], "--like-model is 'sim': it counts only with --like"),
        (["--trace", ""], "no trace ''"),
        (["--trace", "uniform", "--limit", "1", "--policies", f"{__name__}:Broken"], "raised KeyError.*'boom'"),
        (
            ["--trace", "uniform", "--limit", "1", "--policies", f"{__name__}:Broken", "--jobs", "2"],
            "raised KeyError.*'boom'",
        ),
    ],
)
def test_a_wrong_value_ends_with_one_line(arguments, message):
    with pytest.raises((CycloptsError, UnusableSetting, SystemExit)) as caught:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_results_replace_what_stands_between_the_marks(tmp_path):
    page = tmp_path / "routing.md"
    report = compare(("random",))
    write_docs(report, tmp_path)
    page.write_text(page.read_text().replace("# Routing rules compared", "# Ours\n\nwords"))
    write_docs(report, tmp_path)
    text = page.read_text()
    assert text.startswith("# Ours\n\nwords")
    assert text.count("| random |") == 2
    assert (tmp_path / "img" / "goodput.png").exists()
    assert (tmp_path / "routing.json").exists()


def test_the_matrix_covers_three_loads_and_both_kinds_of_fleet():
    assert len({case.load for case in MATRIX if case.workload == "conversation" and case.num_prefill}) >= 3
    equal = {(case.load, case.num_prefill + case.num_decode) for case in MATRIX if not case.num_both}
    calm = {(case.load, case.fleet) for case in MATRIX if case.kill_every_s is None}
    killed = [case for case in MATRIX if case.kill_every_s is not None]
    assert killed
    assert all((case.load, replace(case, kill_every_s=None).fleet) in calm for case in killed)
    assert {(case.load, case.num_both) for case in MATRIX if case.num_both} <= equal
    assert all(case.limit for case in QUICK)


def without_matplotlib(*flags):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from loadtest.simulate import app; "
        "from process.settings import run; sys.exit(run(app))"
    )
    command = [sys.executable, "-c", code, "--trace", "uniform", "--limit", "3", "--policies", "random", *flags]
    return subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)


def test_tables_need_no_matplotlib():
    done = without_matplotlib()
    assert (done.returncode, "random" in done.stdout) == (0, True), done.stderr


def test_plots_without_matplotlib_are_refused_before_anything_runs(tmp_path):
    done = without_matplotlib("--html", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("headrace: --html is ")
    assert "pip install matplotlib" in done.stderr
