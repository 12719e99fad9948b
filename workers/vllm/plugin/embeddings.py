"""On CPU, embeddings are packed for matrix products when one is asked for, not before."""

from typing import Any

from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform


def install() -> None:
    """Replaces `UnquantizedEmbeddingMethod.process_weights_after_loading`."""
    if current_platform.is_cpu():
        UnquantizedEmbeddingMethod.process_weights_after_loading = pack_when_needed


def pack_when_needed(_: UnquantizedEmbeddingMethod, layer: Any) -> None:
    """vLLM packs the input embeddings too, which are only looked up: 0.1 GB in vain for the demo model in float32."""

    def pack(*args: Any) -> Any:
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)  # replaces this function
        return layer.cpu_linear(*args)

    layer.cpu_linear = pack
