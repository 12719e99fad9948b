"""The tools start where only `make install` has run: what the development group brings is for the tests."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GROUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
NOT_INSTALLED = [re.split("[<>=]", requirement)[0].replace("-", "_") for requirement in GROUP]
TOOLS = sorted(path.stem for path in (ROOT / "loadtest").glob("*.py") if "__main__" in path.read_text())


def test_there_are_tools():
    assert {"bench", "bench_index", "live", "simulate"} <= set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_explains_itself(tool):
    code = (
        "import runpy, sys\n"
        f"sys.modules |= dict.fromkeys({NOT_INSTALLED})\n"
        "sys.argv = ['tool', '--help']\n"
        f"runpy.run_module('loadtest.{tool}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "usage" in done.stdout.lower()) == (0, True), done.stderr
