import re

import msgspec
import pytest
from cyclopts import CycloptsError

from loadtest.grid.__main__ import Grid, app
from loadtest.grid.axes import sample
from planes.wire.errors import UnusableSetting

FAST = "9"
"""A cell that is served in a fraction of a second."""


def call(*arguments):
    app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")


def test_equal_seeds_give_equal_figures():
    first, second = (Grid(["headrace", "random"], 0).serve(sample(10, 0)[-1]) for _ in range(2))
    assert msgspec.json.encode(first.rows) == msgspec.json.encode(second.rows)
    assert set(first.cpu_s) == {"headrace", "random"}


def test_single_cells_are_repeated_with_all_their_figures(capsys):
    call("--cells", FAST, "--policies", "headrace,random")
    out = capsys.readouterr().out
    assert "requests/s" in out
    assert "TTFT mean s" in out
    assert "of 1 cells" in out


def test_our_own_rule_alone_is_shown_without_a_verdict(capsys):
    call("--cells", FAST, "--policies", "headrace")
    out = capsys.readouterr().out
    assert "TTFT mean s" in out
    assert "behind" not in out


def test_everything_is_written(tmp_path):
    call("--cells", FAST, "--policies", "headrace,random", "--out", str(tmp_path / "grid"))
    written = msgspec.json.decode((tmp_path / "grid" / "grid.json").read_bytes())
    assert [(cell["name"], [row["policy"] for row in cell["rows"]]) for cell in written["cells"]] == [
        (FAST, ["headrace", "random"])
    ]
    assert written["cells"][0]["values"]["arrivals"]
    assert (tmp_path / "grid" / "grid.txt").read_text().startswith("headrace is behind in")
    assert (tmp_path / "grid" / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "nothing"], "policy is 'nothing'"),
        (["--cells", ""], "--cells is '': at least one is needed"),
        (["--out", "/proc/none"], "--out is '/proc/none': the folder /proc/none cannot be made"),
        (["--cells", "fast"], "--cells is 'fast'.*fast-both-170"),
        (["--only", "size=3"], "--only is 'size=3'.*no axis"),
        (["--only", "answers=1", "answers=16"], "none of the 300 cells"),
        (["--num-cells", "0"], "num-cells"),
        (["--jobs", "0"], "jobs"),
    ],
)
def test_a_wrong_value_ends_with_one_line(arguments, message):
    with pytest.raises((CycloptsError, UnusableSetting, SystemExit)) as caught:
        call(*arguments)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
