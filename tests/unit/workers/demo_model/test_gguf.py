import struct

import pytest

from workers.demo_model.gguf import GgufMalformed, read_gguf


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def test_a_gguf_header_gives_fields_and_absolute_tensor_places():
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 3)
    header += gguf_string("general.name") + struct.pack("<I", 8) + gguf_string("tiny")
    header += gguf_string("size") + struct.pack("<II", 4, 7)
    header += gguf_string("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, -1.0)
    header += gguf_string("token_embd.weight") + struct.pack("<IQQIQ", 2, 3, 5, 0, 64)
    gguf = read_gguf(header + bytes(64))
    assert gguf.fields == {"general.name": "tiny", "size": 7, "scores": [0.5, -1.0]}
    (tensor,) = gguf.tensors
    assert tensor.shape == (5, 3)
    assert tensor.offset == -(-len(header) // 32) * 32 + 64


@pytest.mark.parametrize("data", [b"", b"GGML----", b"GGUF" + struct.pack("<IQQ", 1, 0, 0)])
def test_what_is_no_gguf_file_of_a_known_version_is_refused(data):
    with pytest.raises(GgufMalformed):
        read_gguf(data)
