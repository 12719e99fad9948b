"""On CPU an embedding is packed when a product asks for it; vLLM's layer without an engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

DRIVER = Path(__file__).parent / "embedding_driver.py"


def test_an_embedding_that_is_only_looked_up_is_not_packed():
    environment = os.environ | {"PYTHONPATH": str(DRIVER.parents[2])}
    told = subprocess.run([sys.executable, DRIVER], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["vllm"]["looked_up"] > 0.5, "nothing to save: this vLLM packs no embedding in advance"
    assert found["ours"]["looked_up"] < 0.5
    assert 0.5 < found["ours"]["multiplied"] < 1.5, "packed once"
    assert found["ours"]["is_right"]
