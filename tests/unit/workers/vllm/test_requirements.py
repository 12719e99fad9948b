"""What is missed on a machine is named, with what to do."""

from types import SimpleNamespace

import pytest

from workers.engine.base import EngineStartError
from workers.vllm.requirements import check_accelerator, check_library, check_nixl


def platform(*, num_gpus, is_cpu=False):
    """As vLLM describes it; without a driver or a device it knows no platform at all."""
    return SimpleNamespace(
        is_cpu=lambda: is_cpu, is_unspecified=lambda: not is_cpu and not num_gpus, device_count=lambda: num_gpus
    )


def test_a_missing_library_is_named_with_the_package_that_has_it():
    check_library("libc.so.6", package="libc6")
    with pytest.raises(EngineStartError, match=r"needs libmill\.so\.1: apt-get install libmill1"):
        check_library("libmill.so.1", package="libmill1")


def test_without_a_gpu_it_says_so_and_what_to_do():
    with pytest.raises(EngineStartError, match=r"no GPU is visible to vLLM.*--gpus all.*nvidia-smi.*EXTRA=cpu"):
        check_accelerator(platform(num_gpus=0), num_gpus=1)
    check_accelerator(platform(num_gpus=0, is_cpu=True), num_gpus=1)
    check_accelerator(platform(num_gpus=2), num_gpus=2)


def test_too_few_gpus_are_counted():
    with pytest.raises(EngineStartError, match=r"2 GPUs are visible.* needs 4 \(--tensor-parallel\)"):
        check_accelerator(platform(num_gpus=2), num_gpus=4)


def test_a_device_that_vllm_knows_and_cuda_does_not_show_is_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = SimpleNamespace(is_cpu=lambda: False, is_unspecified=lambda: False, device_count=lambda: 0)
    with pytest.raises(EngineStartError, match=r"no GPU is visible.*CUDA_VISIBLE_DEVICES \(''\) hides them"):
        check_accelerator(hidden, num_gpus=1)


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
