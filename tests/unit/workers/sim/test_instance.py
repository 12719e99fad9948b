import jsonschema
import pytest

from workers.sim.instance import NoInstance, instance_of

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
        }
    },
}
TYPICAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3},
        "kind": {"enum": ["a", "b"]},
        "version": {"const": 2},
        "when": {"type": "string", "format": "date-time"},
        "ratio": {"type": "number", "minimum": 0.5},
        "count": {"type": "integer", "exclusiveMinimum": 3, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]},
        "note": {"type": ["string", "null"]},
        "child": {"type": "object", "properties": {"x": {"$ref": "#/$defs/x"}}, "required": ["x"]},
        "optional": {"type": "string"},
    },
    "required": ["name", "kind", "version", "when", "ratio", "count", "tags", "pair", "note", "child"],
    "additionalProperties": False,
    "$defs": {"x": {"allOf": [{"type": "integer"}, {"minimum": 5}]}},
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "object"}, {}),
        ({}, {}),
        ({"enum": ["b", "a"]}, "b"),
        ({"type": "integer", "minimum": 7, "multipleOf": 5}, 10),
        ({"type": "integer", "maximum": -3}, -3),
        ({"type": "number", "minimum": 0.2, "maximum": 0.4}, 0.30000000000000004),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ""),
        ({"items": {"type": "null"}, "minItems": 2}, [None, None]),
        (TREE, {"value": 0, "next": None}),
        (
            TYPICAL,
            {
                "name": "aaa",
                "kind": "a",
                "version": 2,
                "when": "2026-01-01T00:00:00Z",
                "ratio": 1,
                "count": 4,
                "tags": ["", ""],
                "pair": [0, False],
                "note": "",
                "child": {"x": 5},
            },
        ),
    ],
)
def test_an_instance_is_small_and_valid(schema, expected):
    found = instance_of(schema)
    assert found == expected
    jsonschema.validate(found, schema)


def test_the_calls_of_tools_that_are_required_have_their_first_name_and_arguments():
    call = {
        "type": "object",
        "properties": {"name": {"enum": ["f"]}, "parameters": {"$ref": "#/$defs/p"}},
        "required": ["name", "parameters"],
    }
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": [call]}, "$defs": {"p": {"type": "object"}}}
    assert instance_of(schema) == [{"name": "f", "parameters": {}}]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "a+"}, "does not know pattern"),
        ({"type": "string", "format": "iri"}, "does not know the format 'iri'"),
        ({"type": "array", "minItems": 2, "items": {"type": "null"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "minItems": 10**9}, "minItems is 1000000000"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "no number"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "more than 64 levels"),
        ({"$ref": "#/nowhere"}, "leads nowhere"),
        ({"$ref": "http://example.com/"}, "leads out of the schema"),
        ({"anyOf": []}, "anyOf is no list"),
        ({"type": "thing"}, "'thing' is no type"),
        ({"type": "array", "minItems": "x"}, "it is no schema"),
        ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}, "go round"),
        ({"anyOf": [False]}, "'never' is no type"),
    ],
)
def test_what_the_simulated_engine_cannot_make_up_is_refused_by_name(schema, reason):
    with pytest.raises(NoInstance, match=reason):
        instance_of(schema)
