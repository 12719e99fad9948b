from pathlib import Path

import pytest

from planes.wire.messages import HandoverMode, Role, WorkerId
from workers.vllm.config import (
    VllmOptions,
    _handover,
    _num_gpus,
    _runner,
    _settled,
    _step_tokens,
)


@pytest.mark.parametrize("mode", HandoverMode)
@pytest.mark.parametrize("role", Role)
def test_vllm_chooses_where_kv_caches_wait_unless_it_runs_on_cpu(mode, role):
    options = VllmOptions(Path("/model"), "m", WorkerId("w"), role=role, handover=mode)
    assert "kv_buffer_device" not in _handover(options, is_cpu=False)
    assert _handover(options, is_cpu=True)["kv_buffer_device"] == "cpu"


def test_vllm_takes_another_role_only_where_its_connector_was_made_for_both_sides():
    def roles(role, handover=HandoverMode.PULL):
        return VllmOptions(Path("/model"), "m", WorkerId("w"), role=role, handover=handover).roles

    assert set(roles(Role.BOTH)) == set(Role)
    assert roles(Role.PREFILL) == roles(Role.DECODE) == roles(Role.BOTH, None) == ()


@pytest.mark.parametrize("is_cpu", [True, False])
def test_how_prompts_for_vectors_are_computed_is_left_to_vllm(is_cpu):
    options = VllmOptions(Path("/model"), "m", WorkerId("w"), is_embedding=True)
    assert _runner(options) == {"runner": "pooling", "convert": "embed"}
    assert _step_tokens(options, _settled(options, is_cpu=is_cpu), is_cpu=is_cpu) is None


def test_what_a_processor_bears_is_no_limit_of_a_gpu():
    options = VllmOptions(Path("/model"), "m", WorkerId("w"), role=Role.DECODE, dtype="float32")
    cpu, gpu = (_settled(options, is_cpu=is_cpu) for is_cpu in (True, False))
    assert (cpu["max_num_seqs"], _step_tokens(options, cpu, is_cpu=True)) == (32, 40)
    assert (gpu["max_num_seqs"], gpu["max_model_len"], _step_tokens(options, gpu, is_cpu=False)) == (None, None, None)
    assert "kv_cache_memory_bytes" not in gpu


@pytest.mark.parametrize(
    ("more", "num_gpus"),
    [
        ({}, 2),
        ({"pipeline_parallel_size": 3}, 6),
        ({"pipeline_parallel_size": 2, "nnodes": 2}, 2),
        ({"pipeline_parallel_size": 4, "distributed_executor_backend": "ray"}, 1),
    ],
)
def test_an_engine_needs_as_many_gpus_here_as_it_has_parts_here(more, num_gpus):
    assert _num_gpus({"tensor_parallel_size": 2} | more) == num_gpus
