from typing import Literal

import msgspec
import pytest

from app.http.json_schema import Schemas


class Tree(msgspec.Struct):
    kind: Literal["leaf", "node"]
    children: "list[Tree] | None" = None
    raw: msgspec.Raw = msgspec.Raw(b"null")
    sizes: dict[str, float] | None = None


class Unwritten(msgspec.Struct):
    blob: bytes


def test_a_struct_that_holds_itself_is_written_once_and_referred_to():
    schemas = Schemas([Tree], {"Tree": {"raw": {"enum": [None, 0]}}})
    assert schemas.ref(Tree) == {"$ref": "#/components/schemas/Tree"}
    assert schemas.components == {
        "Tree": {
            "title": "Tree",
            "type": "object",
            "properties": {
                "kind": {"enum": ["leaf", "node"]},
                "children": {
                    "anyOf": [{"type": "array", "items": {"$ref": "#/components/schemas/Tree"}}, {"type": "null"}]
                },
                "raw": {"enum": [None, 0]},
                "sizes": {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]},
            },
            "required": ["kind"],
        }
    }


def test_two_structs_of_one_name_are_told_apart():
    other = msgspec.defstruct("Tree", [("height", int)], module="app.garden")
    schemas = Schemas([Tree, other], {})
    assert schemas.ref(other) == {"$ref": "#/components/schemas/garden_Tree"}
    assert set(schemas.components) == {"Tree", "garden_Tree"}


def test_a_type_without_a_schema_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match="BytesType"):
        Schemas([Unwritten], {})
