import json

import pytest

from app.http.routes.embeddings import _check_dimensions
from app.openai.embeddings import parse_embedding
from app.prompt.prepare import ModelEntry
from planes.wire.errors import InvalidRequest


def model(**facts):
    return ModelEntry("vectors", None, None, 512, 16, 300, embedding_size=64, **facts)


def asked(dimensions):
    return parse_embedding(json.dumps({"model": "vectors", "input": "a", "dimensions": dimensions}).encode())


@pytest.mark.parametrize(
    ("facts", "dimensions"),
    [
        ({}, None),
        ({}, 64),
        ({"is_matryoshka": True}, 1),
        ({"is_matryoshka": True, "matryoshka_dimensions": (32, 16)}, 16),
        ({"is_matryoshka": True, "matryoshka_dimensions": (32, 16)}, 64),
    ],
)
def test_a_vector_is_cut_to_what_its_model_allows(facts, dimensions):
    _check_dimensions(asked(dimensions), model(**facts))


@pytest.mark.parametrize(
    ("facts", "dimensions", "told"),
    [
        ({}, 32, "have 64, which cannot be cut"),
        ({"is_matryoshka": True}, 65, "65 is out of range; the vectors of 'vectors' have 64"),
        ({"is_matryoshka": True, "matryoshka_dimensions": (32, 16)}, 8, "8 is none of 16, 32, to which the vectors of"),
    ],
)
def test_any_other_size_is_refused_with_those_that_are_possible(facts, dimensions, told):
    with pytest.raises(InvalidRequest, match=told) as refused:
        _check_dimensions(asked(dimensions), model(**facts))
    assert refused.value.param == "dimensions"
