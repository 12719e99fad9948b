import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]


def test_without_a_gpu_the_check_says_so_and_what_to_do():
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.gpu_check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no GPU" in done.stdout
    assert "make install EXTRA=" in done.stdout
    assert "Traceback" not in done.stderr
