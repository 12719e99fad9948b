"""Vectors of prompts, by vLLM's pooling runner. No vLLM needed here: its objects are read by their attributes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planes.wire.frames import FinishReason
from workers.engine.base import EngineOutput, EngineStartError

TASK = "embed"
"""vLLM's name of what is asked for."""


@dataclass(frozen=True, slots=True)
class VectorFacts:
    """As in `planes.wire.messages.EngineFacts`."""

    embedding_size: int = 0
    is_matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()


NO_VECTORS = VectorFacts()


@dataclass(frozen=True, slots=True)
class Pooled:
    """How long one prompt took."""

    queue_s: float = 0.0
    prefill_s: float = 0.0


NOT_MEASURED = Pooled()


def check_tasks(model: str, tasks: Sequence[str]) -> None:
    """tasks: what vLLM can do with the model.  Raises:  EngineStartError."""
    if TASK not in tasks:
        raise EngineStartError(
            f"vLLM makes no vectors with the model {model}, which is for {', '.join(tasks) or 'nothing'}: name another "
            "one, or leave out --task embed"
        )


def vector_facts(model: Any) -> VectorFacts:
    """model: vLLM's ModelConfig of a pooling engine.

    Whoever cuts a vector brings it to length 1 again: those that the model's makers leave longer are not cut.
    """
    is_cut = bool(model.is_matryoshka) and model.pooler_config.use_activation is not False
    return VectorFacts(model.embedding_size, is_cut, tuple(model.matryoshka_dimensions or ()) if is_cut else ())


def vector_output(output: Any, facts: VectorFacts, pooled: Pooled) -> EngineOutput:
    """output: vLLM's PoolingRequestOutput, with the vector as a tensor of shape (n,), n = 0 if it was aborted."""
    vector = output.outputs.data.float().numpy().astype("<f4")
    error = ""
    if vector.shape != (facts.embedding_size,):
        error = f"vLLM gave {vector.size} numbers, and the model's vectors have {facts.embedding_size}"
    elif not np.isfinite(vector).all():
        error = f"{np.count_nonzero(~np.isfinite(vector))} of the vector's {vector.size} numbers are not finite"
    if error:
        return EngineOutput(0, (), finish=FinishReason.ERROR, error=error)
    return EngineOutput(
        0,
        (),
        finish=FinishReason.STOP,
        embedding=vector.tobytes(),
        cached_tokens=output.num_cached_tokens,
        queue_s=pooled.queue_s,
        prefill_s=pooled.prefill_s,
    )
