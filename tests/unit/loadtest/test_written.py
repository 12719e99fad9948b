import json

from loadtest.written import grid, write


def test_figures_and_tables_are_written_and_shown(tmp_path, capsys):
    write(tmp_path / "new", "bench", {"a": 1}, ["Here.", "| a |"])
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "bench.md").read_text() == "Here.\n\n| a |\n"
    assert "bench.json" in capsys.readouterr().out


def test_a_cell_cannot_break_its_table():
    assert grid(["a"], [["b|c"]]).splitlines()[-1] == "| b/c |"
