"""What two vLLM engines must have in common to hand KV caches over to each other."""

from collections.abc import Sequence
from typing import Any

from workers.engine.layout import layout_hash
from workers.vllm.request import KvGroup


def vllm_layout(config: Any, groups: Sequence[KvGroup], *, version: str, connector_version: int, mode: str) -> str:
    """What NIXL's connector compares when two engines meet (`compute_nixl_compatibility_hash`), and the block sizes.

    Told before they meet, so that nobody sends a request to a pair that would refuse it. The degree of tensor
    parallelism is left out: engines with different ones may hand over.

    Args:  config: vLLM's own, as its engine runs.  groups: of its KV cache.  version: of vLLM.
    """
    model, cache = config.model_config, config.cache_config
    return layout_hash(
        {
            "engine": "vllm",
            "version": version,
            "connector_version": connector_version,
            "mode": mode,
            "model": model.model,
            "dtype": str(model.dtype),
            "cache_dtype": str(cache.cache_dtype),
            "num_kv_heads": model.get_total_num_kv_heads(),
            "head_size": model.get_head_size(),
            "num_layers": model.get_total_num_hidden_layers(),
            "has_hybrid_groups": not config.scheduler_config.disable_hybrid_kv_cache_manager,
            "block_size": cache.block_size,
            "groups": [[group.block_size, group.window] for group in groups],
        }
    )
