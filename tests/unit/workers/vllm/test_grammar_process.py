"""What a child that tries a grammar may take; the grammars' libraries are in the end-to-end tests."""

import signal

import pytest

from workers.vllm.grammar_process import TooCostly, TooLate, alone


def test_what_the_work_raises_is_told():
    assert alone(lambda: None) == ""
    assert alone(lambda: int("a")).startswith("invalid literal")


def test_work_that_computes_or_waits_for_too_long_is_ended():
    def compute():
        while True:
            pass

    with pytest.raises(TooCostly, match=r"more than 1 s$"):
        alone(compute, max_cpu_s=1, max_wall_s=None)
    with pytest.raises(TooLate, match=r"after 0\.1 s$"):
        alone(signal.pause, max_wall_s=0.1)
