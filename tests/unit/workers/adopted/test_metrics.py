from tests.unit.workers.adopted.vllm_server import METRICS
from workers.adopted.metrics import ServerLoad, read_cache_config, read_load


def test_the_load_is_what_runs_waits_and_is_used():
    assert read_load(METRICS) == ServerLoad(2, 1, 0.25)


def test_what_is_not_told_is_nothing():
    assert read_load("") == ServerLoad(0, 0, 0.0)
    assert read_cache_config("up 1.0") == {}


def test_the_cache_s_configuration_is_in_labels():
    config = read_cache_config(METRICS)
    assert (config["block_size"], config["num_gpu_blocks"], config["kv_cache_dtype_skip_layers"]) == ("4", "68", "[]")
