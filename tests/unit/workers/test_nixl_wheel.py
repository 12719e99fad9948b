import pytest

from workers.nixl_wheel import installed_wheel


@pytest.mark.parametrize(
    ("installed", "cuda", "chosen"),
    [
        ({"nixl_cu12", "nixl_cu13"}, "12.8", "nixl_cu12"),
        ({"nixl_cu12", "nixl_cu13"}, "13.0", "nixl_cu13"),
        ({"nixl_cu12", "nixl_cu13"}, None, "nixl_cu13"),
        ({"nixl_cu12"}, "13.0", "nixl_cu12"),
        ({"nixl_cu12"}, None, "nixl_cu12"),
        (set(), "13.0", None),
    ],
)
def test_the_wheel_for_torch_s_cuda_goes_before_others(installed, cuda, chosen):
    assert installed_wheel(cuda, find=lambda name: name if name in installed else None) == chosen
