import numpy as np

from workers.sim.embedding import EMBEDDING_SIZE, embedding_of


def vector(text):
    return np.frombuffer(embedding_of(np.array([*text.encode()], dtype=np.uint32)), dtype="<f4")


def test_a_vector_is_of_length_1_and_a_function_of_the_prompt():
    assert vector("a mill").shape == (EMBEDDING_SIZE,)
    assert np.isclose(np.linalg.norm(vector("a mill")), 1.0)
    assert vector("a mill").tolist() == vector("a mill").tolist() != vector("a hill").tolist()
    assert vector("text 12").tolist() != vector("text 21").tolist()


def test_prompts_with_more_in_common_are_nearer():
    assert vector("a water mill") @ vector("a wind mill") > vector("a water mill") @ vector("0123456789")


def test_a_vocabulary_of_any_size_is_taken():
    tokens = np.arange(10_000, dtype=np.uint32) * np.uint32(400_000)
    assert np.isclose(np.linalg.norm(np.frombuffer(embedding_of(tokens), dtype="<f4")), 1.0)
