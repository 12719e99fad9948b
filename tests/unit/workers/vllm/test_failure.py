"""A failed start says why, though the reason is another process's."""

import logging

import pytest

from workers.vllm.failure import cause_of, expect_failure, note_failures

ENDED = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}")


@pytest.fixture
def vllm_log(tmp_path, monkeypatch):
    """A logger of vLLM's in an engine process."""
    monkeypatch.setenv("HEADRACE_VLLM_FAILURE", "")
    expect_failure(tmp_path)
    parent = logging.getLogger("vllm")
    handlers = list(parent.handlers)
    note_failures()
    yield logging.getLogger("vllm.v1.engine.core")
    parent.handlers = handlers


def test_the_engine_process_s_last_error_is_the_reason(vllm_log):
    vllm_log.error("EngineCore failed to start.", exc_info=ValueError("no memory\nfor the KV cache"))
    vllm_log.error("an error without an exception says nothing")
    assert cause_of(ENDED) == "its engine process failed with ValueError: no memory for the KV cache"


def test_a_process_that_left_nothing_points_to_its_output(vllm_log):
    assert cause_of(ENDED) == "its engine process failed, and its last lines above say why"


def test_other_errors_speak_for_themselves():
    assert cause_of(ValueError("no such dtype")) == "ValueError: no such dtype"
