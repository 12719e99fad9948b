"""Which of vLLM's own arguments an operator may give."""

import ast
import inspect
from pathlib import Path

import pytest

from planes.wire.messages import WorkerId
from workers.engine.base import EngineStartError
from workers.vllm import config
from workers.vllm.arguments import REFUSED, REPLACED, refuse


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kv_transfer_config", r"--kv-transfer-config cannot be given: it is made for handovers"),
        ("prefix_caching_hash_algo", "names of blocks"),
        ("skip_tokenizer_init", "reads and writes tokens"),
        ("data_parallel_size", "start one for each rank"),
        ("served_model_name", "a setting of its own for it, --served-model-name"),
    ],
)
def test_what_would_break_a_handover_is_refused_with_the_reason(name, reason):
    with pytest.raises(EngineStartError, match=reason):
        refuse({"quantization": "fp8", name: "x"})


def test_anything_else_is_vllms_to_judge():
    refuse({"quantization": "fp8", "pipeline_parallel_size": 2, "max_model_len": 4096, "enable_lora": True})


def test_of_all_that_a_worker_sets_it_is_said_whether_an_operator_may():
    """So that what is set tomorrow, too, is neither overwritten by chance nor refused without a reason."""
    tree = ast.parse(inspect.getsource(config))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "AsyncEngineArgs"]
    ours = {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
    assert len(ours) > 5
    assert ours <= set(REFUSED)
    assert set(config._runner(_options(is_embedding=True))) <= set(REFUSED)
    for is_cpu in (True, False):
        assert set(config._settled(_options(kv_cache_bytes=1, max_num_batched_tokens=1), is_cpu=is_cpu)) <= REPLACED
    assert not REPLACED & set(REFUSED)


def _options(**more):
    return config.VllmOptions(Path("/model"), "m", WorkerId("w"), **more)
