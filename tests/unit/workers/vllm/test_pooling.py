"""Vectors as vLLM gives them, in our words; vLLM's objects are replaced by plain ones with the same names."""

from types import SimpleNamespace

import numpy as np
import pytest

from planes.wire.frames import FinishReason
from workers.engine.base import EngineOutput, EngineStartError
from workers.vllm.pooling import Pooled, VectorFacts, check_tasks, vector_facts, vector_output

FACTS = VectorFacts(embedding_size=3)


def from_vllm(*numbers):
    """vLLM's output; its tensor has two methods."""
    wide = SimpleNamespace(numpy=lambda: np.array(numbers, dtype=np.float32))
    outputs = SimpleNamespace(data=SimpleNamespace(float=lambda: wide))
    return SimpleNamespace(outputs=outputs, num_cached_tokens=32)


def config(*, is_matryoshka=True, dimensions=None, use_activation=None):
    pooler = SimpleNamespace(use_activation=use_activation)
    return SimpleNamespace(
        embedding_size=576, is_matryoshka=is_matryoshka, matryoshka_dimensions=dimensions, pooler_config=pooler
    )


def test_a_vector_ends_its_request_with_what_was_measured():
    output = vector_output(from_vllm(0.6, 0.0, 0.8), FACTS, Pooled(queue_s=2.0, prefill_s=3.0))
    assert output == EngineOutput(
        0,
        (),
        finish=FinishReason.STOP,
        embedding=np.array([0.6, 0.0, 0.8], dtype="<f4").tobytes(),
        cached_tokens=32,
        queue_s=2.0,
        prefill_s=3.0,
    )


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((), r"vLLM gave 0 numbers, and the model's vectors have 3"),
        ((1.0, 2.0), r"vLLM gave 2 numbers"),
        ((np.nan, 0.0, np.inf), r"2 of the vector's 3 numbers are not finite"),
    ],
)
def test_what_is_no_vector_is_an_error_and_never_an_answer(numbers, told):
    output = vector_output(from_vllm(*numbers), FACTS, Pooled())
    assert (output.finish, output.embedding) == (FinishReason.ERROR, b"")
    assert told in output.error


def test_a_vector_may_be_cut_only_where_the_model_says_so():
    assert vector_facts(config(is_matryoshka=False)) == VectorFacts(576)
    assert vector_facts(config()) == VectorFacts(576, is_matryoshka=True)
    assert vector_facts(config(dimensions=[256, 64])) == VectorFacts(576, True, (256, 64))


def test_a_vector_that_is_not_of_length_1_is_not_cut():
    assert vector_facts(config(dimensions=[256], use_activation=False)) == VectorFacts(576)


def test_a_model_that_makes_no_vectors_is_refused_by_name():
    check_tasks("m", ["embed", "token_embed"])
    with pytest.raises(EngineStartError, match=r"no vectors with the model m, which is for classify, score.*--task"):
        check_tasks("m", ["classify", "score"])
