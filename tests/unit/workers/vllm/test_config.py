from pathlib import Path
from types import SimpleNamespace

import pytest

from planes.wire.messages import HandoverMode, Role, WorkerId
from workers.engine.base import EngineStartError
from workers.vllm.config import (
    VllmOptions,
    _handover,
    _runner,
    _step_tokens,
    check_accelerator,
    check_library,
    check_nixl,
)


def platform(*, num_gpus, is_cpu=False):
    """As vLLM describes it; without a driver or a device it knows no platform at all."""
    return SimpleNamespace(
        is_cpu=lambda: is_cpu, is_unspecified=lambda: not is_cpu and not num_gpus, device_count=lambda: num_gpus
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
    assert _step_tokens(options, is_cpu=is_cpu) is None


def test_a_missing_library_is_named_with_the_package_that_has_it():
    check_library("libc.so.6", package="libc6")
    with pytest.raises(EngineStartError, match=r"needs libmill\.so\.1: apt-get install libmill1"):
        check_library("libmill.so.1", package="libmill1")


def test_without_a_gpu_it_says_so_and_what_to_do():
    with pytest.raises(EngineStartError, match=r"no GPU is visible to vLLM.*--gpus all.*nvidia-smi.*EXTRA=cpu"):
        check_accelerator(platform(num_gpus=0), tensor_parallel=1)
    check_accelerator(platform(num_gpus=0, is_cpu=True), tensor_parallel=1)
    check_accelerator(platform(num_gpus=2), tensor_parallel=2)


def test_too_few_gpus_are_counted():
    with pytest.raises(EngineStartError, match=r"2 GPUs are visible.* needs 4 \(--tensor-parallel\)"):
        check_accelerator(platform(num_gpus=2), tensor_parallel=4)


def test_a_device_that_vllm_knows_and_cuda_does_not_show_is_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = SimpleNamespace(is_cpu=lambda: False, is_unspecified=lambda: False, device_count=lambda: 0)
    with pytest.raises(EngineStartError, match=r"no GPU is visible.*CUDA_VISIBLE_DEVICES \(''\) hides them"):
        check_accelerator(hidden, tensor_parallel=1)


@pytest.mark.parametrize(
    ("installed", "cuda"),
    [
        ({"nixl_cu13"}, "13.0"),
        ({"nixl_cu12"}, "12.8"),
        ({"nixl_cu12"}, None),
        ({"nixl_cu13"}, None),
        ({"nixl"}, "13.0"),
    ],
)
def test_the_nixl_that_fits_torch_s_cuda_will_do(installed, cuda):
    check_nixl(cuda, find=lambda name: name if name in installed else None)


@pytest.mark.parametrize(
    ("installed", "cuda", "told"),
    [
        (
            set(),
            "13.0",
            r"NIXL, which is not installed.*CUDA 13\.0: pip install nixl-cu13==1\.5\.1, or --handover none",
        ),
        ({"nixl_cu12"}, "13.0", r"another CUDA \(nixl_cu12\).*pip install nixl-cu13==1\.5\.1"),
        (set(), None, r"not installed: pip install nixl-cu12==1\.5\.1"),
    ],
)
def test_a_missing_or_unfitting_nixl_is_named_before_the_engine_starts(installed, cuda, told):
    with pytest.raises(EngineStartError, match=told):
        check_nixl(cuda, find=lambda name: name if name in installed else None)
