import base64
import json
from typing import get_type_hints

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.embedding_create_params import EmbeddingCreateParams

from app.openai.embeddings import EmbeddingBody, embedding_body, parse_embedding
from app.openai.schema import Kind, Limits
from planes.wire.errors import InvalidRequest

VECTOR = np.array([0.6, 0.0, 0.8], dtype="<f4")


def asked(**fields):
    return parse_embedding(json.dumps({"model": "m", "input": "a", **fields}).encode())


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_each_input_is_a_prompt_of_its_own(given, prompts):
    parsed = asked(input=given).parsed
    found = [each if isinstance(each, str) else each.tolist() for each in (parsed.prompt, *parsed.more_prompts)]
    assert (parsed.kind, found) == (Kind.EMBEDDING, prompts)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a", 7]}, "input[1]"),
        ({"input": [1, "a"]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "many"}, "dimensions"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        asked(**fields)
    assert refused.value.param == param


def test_every_field_of_the_client_is_known():
    assert set(get_type_hints(EmbeddingCreateParams)) <= set(EmbeddingBody.__struct_fields__)


def test_fields_that_nobody_knows_are_left_out_or_refused():
    assert asked(mill=1).parsed.ignored == ("mill",)
    with pytest.raises(InvalidRequest, match="mill"):
        parse_embedding(b'{"model": "m", "input": "a", "mill": 1}', Limits(has_strict_fields=True))


def test_vectors_are_lists_or_base64_and_the_same():
    told = [
        json.loads(embedding_body("m", [VECTOR.tobytes()] * 2, asked(encoding_format=f), prompt_tokens=5))
        for f in (None, "base64")
    ]
    listed = CreateEmbeddingResponse.model_validate(told[0], strict=True)
    assert [each.index for each in listed.data] == [0, 1]
    assert (listed.usage.prompt_tokens, listed.usage.total_tokens, listed.model) == (5, 5, "m")
    assert listed.data[1].embedding == pytest.approx([0.6, 0.0, 0.8])
    assert base64.b64decode(told[1]["data"][0]["embedding"]) == VECTOR.tobytes()


def test_the_first_numbers_of_a_vector_are_of_length_1_again():
    told = json.loads(embedding_body("m", [VECTOR.tobytes()], asked(dimensions=2), prompt_tokens=1))
    assert told["data"][0]["embedding"] == [1.0, 0.0]
    nothing = np.array([0, 1], dtype="<f4").tobytes()
    assert json.loads(embedding_body("m", [nothing], asked(dimensions=1), prompt_tokens=1))["data"][0]["embedding"] == [
        0.0
    ]
