import json

import pytest

from loadtest.written import check_file, check_folder, grid, write
from planes.wire.errors import UnusableSetting


def test_figures_and_tables_are_written_and_shown(tmp_path, capsys):
    write(tmp_path / "new", "bench", {"a": 1}, ["Here.", "| a |"])
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "bench.md").read_text() == "Here.\n\n| a |\n"
    assert "bench.json" in capsys.readouterr().out


def test_a_cell_cannot_break_its_table():
    assert grid(["a"], [["b|c"]]).splitlines()[-1] == "| b/c |"


def test_where_nothing_can_be_written_is_told_before_it_takes_its_time(tmp_path):
    file = tmp_path / "new" / "plan.json"
    check_file("json", file)
    assert file.parent.is_dir()
    assert not file.exists()
    check_file("json", None)
    check_folder("out", None)
    with pytest.raises(UnusableSetting, match=f"--json is '{tmp_path}': that is a folder"):
        check_file("json", tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(UnusableSetting, match=r"the folder .*taken cannot be made"):
        check_folder("out", tmp_path / "taken")
