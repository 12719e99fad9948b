import numpy as np
import pytest

from workers.demo_model.gguf import GgufMalformed, GgufTensor
from workers.demo_model.quantization import dequantized

PADDING = b"????"


def test_float32_is_taken_as_it_is():
    data = PADDING + np.array([[1.5, -2.0], [0.0, 3.0]], "<f4").tobytes()
    assert dequantized(GgufTensor("t", (2, 2), 0, 4), data).tolist() == [[1.5, -2.0], [0.0, 3.0]]


def test_q8_0_has_a_scale_for_32_values():
    data = PADDING
    for scale in (0.5, -2.0):
        data += np.array([scale], "<f2").tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
    values = dequantized(GgufTensor("t", (2, 32), 8, 4), data)
    assert values.tolist() == [[0.5 * n for n in range(-16, 16)], [-2.0 * n for n in range(-16, 16)]]


def test_q4_1_has_a_scale_and_a_least_value_and_its_low_nibbles_come_first():
    packed = bytes(low | (15 - low) << 4 for low in range(16))
    data = PADDING + np.array([0.25, -1.0], "<f2").tobytes() + packed
    (values,) = dequantized(GgufTensor("t", (1, 32), 3, 4), data).tolist()
    assert values == [0.25 * n - 1 for n in [*range(16), *range(15, -1, -1)]]


def test_another_format_is_refused_by_its_number():
    with pytest.raises(GgufMalformed, match=r"tensor t has format 12, .*Q4_1 \(3\)"):
        dequantized(GgufTensor("t", (1, 256), 12, 0), bytes(256))
