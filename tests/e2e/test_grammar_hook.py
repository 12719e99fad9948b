"""A grammar advanced by resumed tokens masks what the one masks that generated them; vLLM's parts without an engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

DRIVER = Path(__file__).parent / "grammar_driver.py"


def test_a_resumed_grammar_masks_what_the_undisturbed_one_does_and_no_busy_machine_ends_a_regex(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(DRIVER.parents[2])}
    told = subprocess.run(
        [sys.executable, DRIVER, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["compared"] > 1000
    assert found["ended"] > 20
    assert found["refused"] == "number 0 of 1 resumed tokens breaks the grammar"
    assert "grammar.failed request=r kind=regex characters=1 error=GrammarRejectsResume" in told.stdout + told.stderr
    assert not found["has_limit"]
