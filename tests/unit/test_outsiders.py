import sys

import pytest

from tests.outsiders import Unended, output_of


async def test_what_a_program_prints_is_returned_and_it_knows_nothing_of_our_code(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    said = await output_of(sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))", patience_s=60)
    assert said.split() == [b"None"]


FAILING = """
import sys
print("half", flush=True)
sys.exit("done")
"""


async def test_one_that_fails_tells_what_it_printed_on_both_outputs():
    with pytest.raises(Unended, match=r"status 1:\nhalf\s+done"):
        await output_of(sys.executable, "-c", FAILING, patience_s=60)


async def test_one_that_does_not_end_is_ended():
    with pytest.raises(Unended, match=r"within 0\.1 s"):
        await output_of("sleep", "600", patience_s=0.1)
