"""The generated reference page."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "reference.py"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_what_the_code_says(module):
    assert module.TARGET.read_text() == module.reference(), "stale: run make docs"


def test_every_field_and_header_of_ours_is_told(module):
    bodies = (ROOT / "app" / "openai" / "bodies.py").read_text()
    extensions = [part.partition("\n\n")[0] for part in bodies.split("    # extensions\n")[1:]]
    assert [line.split(":")[0].strip() for each in extensions for line in each.splitlines()] == list(module.FIELDS)
    code = "".join(file.read_text() for file in (ROOT / "app").rglob("*.py"))
    assert set(re.findall(r'"(x-headrace-[a-z-]+|x-request-id)"', code)) <= {name for name, *_ in module.HEADERS}
