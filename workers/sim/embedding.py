"""Vectors of prompts without a model: each token and each pair has a pseudo-random one; a prompt's is their sum.

So equal prompts have equal vectors, others do not, and prompts with much in common are near each other.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

EMBEDDING_SIZE: Final = 64

_STEP: Final = np.uint64(0x9E3779B97F4A7C15)


def embedding_of(prompt: npt.NDArray[np.uint32], size: int = EMBEDDING_SIZE) -> bytes:
    """float32, little-endian, of length 1.  prompt: shape (n,), n >= 1."""
    tokens = prompt.astype(np.uint64)
    pairs = ((tokens[:-1] + np.uint64(1)) << np.uint64(32)) | tokens[1:]
    units, counts = np.unique(np.concatenate((tokens, pairs)), return_counts=True)
    total = np.zeros(size)
    for start in range(0, len(units), 4096):  # a bound on memory, whatever the prompt
        total += counts[start : start + 4096] @ _numbers(units[start : start + 4096], size)
    return (total / np.linalg.norm(total)).astype("<f4").tobytes()


def _numbers(units: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.float64]:
    """From -1 to 1, shape (n, size): splitmix64 of unit and column."""
    columns = np.arange(1, size + 1, dtype=np.uint64)
    mixed: npt.NDArray[np.uint64] = np.add.outer(units * np.uint64(size), columns) * _STEP
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    numbers: npt.NDArray[np.float64] = (mixed ^ (mixed >> np.uint64(31))) / 2.0**63 - 1.0
    return numbers
