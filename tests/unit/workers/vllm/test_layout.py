from types import SimpleNamespace

import pytest

from workers.vllm.layout import vllm_layout
from workers.vllm.request import KvGroup

GROUPS = [KvGroup(4096, 32, 0), KvGroup(4096, 32, 512)]


def layout(groups=GROUPS, *, version="0.32.0", connector_version=14, mode="pull", **changes):
    values = {
        "model": "/models/m",
        "dtype": "torch.bfloat16",
        "cache_dtype": "auto",
        "num_kv_heads": 8,
        "head_size": 128,
        "num_layers": 32,
        "is_split": False,
        "block_size": 32,
    } | changes
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=values["model"],
            dtype=values["dtype"],
            get_total_num_kv_heads=lambda: values["num_kv_heads"],
            get_head_size=lambda: values["head_size"],
            get_total_num_hidden_layers=lambda: values["num_layers"],
        ),
        cache_config=SimpleNamespace(cache_dtype=values["cache_dtype"], block_size=values["block_size"]),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=values["is_split"]),
    )
    return vllm_layout(config, groups, version=version, connector_version=connector_version, mode=mode)


def test_engines_alike_have_one_layout():
    assert layout() == layout(list(GROUPS))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.33.0"},
        {"connector_version": 15},
        {"mode": "push"},
        {"model": "/models/n"},
        {"dtype": "torch.float32"},
        {"cache_dtype": "fp8"},
        {"num_kv_heads": 4},
        {"head_size": 64},
        {"num_layers": 16},
        {"is_split": True},
        {"block_size": 16},
        {"groups": [KvGroup(4096, 32, 0)]},
    ],
)
def test_what_a_handover_cannot_bridge_makes_another_layout(change):
    assert layout(**change) != layout()


def test_engines_on_different_numbers_of_gpus_have_one_layout():
    halves = [KvGroup(2048, group.block_size, group.window) for group in GROUPS]
    assert layout(halves) == layout()
