"""What docs/peers.json says of vLLM is what the installed one has."""

import importlib.util
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[2] / "docs" / "api.py"


def test_the_table_has_vllm_s_own_fields_and_routes():
    spec = importlib.util.spec_from_file_location("api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads(module.PEERS.read_text())[0] == module.vllm_table(), "stale: python docs/api.py --vllm"
