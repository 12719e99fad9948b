"""Tensors of a GGUF file as float32. Source of the formats: ggml's `ggml-common.h`, `block_q4_1` and `block_q8_0`."""

import math
import mmap

import numpy as np
import numpy.typing as npt

from workers.demo_model.gguf import GgufMalformed, GgufTensor

_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCK = 32
_Q4_1_BLOCK = np.dtype([("scale", "<f2"), ("least", "<f2"), ("values", "u1", _BLOCK // 2)])
_Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", _BLOCK)])


def dequantized(tensor: GgufTensor, data: "mmap.mmap | bytes") -> npt.NDArray[np.float32]:
    """The tensor's values, in its shape.  Raises:  GgufMalformed for a format that is not read here."""
    size = math.prod(tensor.shape)
    if tensor.kind == _F32:
        return np.frombuffer(data, "<f4", size, tensor.offset).reshape(tensor.shape)
    if tensor.kind == _Q8_0:
        blocks = np.frombuffer(data, _Q8_0_BLOCK, size // _BLOCK, tensor.offset)
        return _scaled(blocks, blocks["values"]).reshape(tensor.shape)
    if tensor.kind == _Q4_1:
        blocks = np.frombuffer(data, _Q4_1_BLOCK, size // _BLOCK, tensor.offset)
        halves = np.concatenate([blocks["values"] & 15, blocks["values"] >> 4], axis=1)  # the low nibbles come first
        return (_scaled(blocks, halves) + blocks["least"].astype(np.float32)[:, None]).reshape(tensor.shape)
    raise GgufMalformed(f"tensor {tensor.name} has format {tensor.kind}, which is none of F32 (0), Q4_1 (3), Q8_0 (8)")


def _scaled(blocks: npt.NDArray[np.void], values: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    scaled: npt.NDArray[np.float32] = blocks["scale"].astype(np.float32)[:, None] * values.astype(np.float32)
    return scaled
