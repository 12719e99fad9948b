"""JSON Schemas of the structs that bodies are decoded into, for the API's description.

msgspec's own writer cannot tell the default of a field that stays raw, and says of our bodies that they take no other
field: unknown ones are left out unless `--strict-fields` is set.
"""

from collections.abc import Iterable
from typing import Any, Final

import msgspec
from msgspec import inspect

_SCALARS: Final[dict[type[inspect.Type], dict[str, str]]] = {
    inspect.StrType: {"type": "string"},
    inspect.BoolType: {"type": "boolean"},
    inspect.IntType: {"type": "integer"},
    inspect.FloatType: {"type": "number"},
    inspect.NoneType: {"type": "null"},
    inspect.AnyType: {},
    inspect.RawType: {},
}


class Schemas:
    """The schemas of some structs and of all that stands in them. `ref` tells where one is."""

    def __init__(self, kinds: Iterable[type[msgspec.Struct]], known: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Args:  known: for a struct's name, the schemas of fields that say more than their types."""
        self.components: dict[str, Any] = {}
        self._known = known
        self._names: dict[type, str] = {}
        for kind in kinds:
            self._reference(inspect.type_info(kind))

    def ref(self, kind: type[msgspec.Struct]) -> dict[str, str]:
        """A reference to one of them."""
        return {"$ref": f"#/components/schemas/{self._names[kind]}"}

    def _reference(self, info: Any) -> dict[str, Any]:
        kind = info.cls
        if kind not in self._names:
            name = kind.__name__
            if name in self.components:  # two dialects have a `Tool` each
                name = f"{kind.__module__.removeprefix('app.').replace('.', '_')}_{name}"
            self._names[kind] = name
            self.components[name] = {}  # it is known before its fields are looked at: a block may hold blocks
            self.components[name] = self._object(info)
        return self.ref(kind)

    def _object(self, info: Any) -> dict[str, Any]:
        known = self._known.get(info.cls.__name__, {})
        properties = {
            field.encode_name: known.get(field.encode_name) or self._schema(field.type) for field in info.fields
        }
        return {
            "title": info.cls.__name__,
            "type": "object",
            "properties": properties,
            "required": [field.encode_name for field in info.fields if field.required],
        }

    def _schema(self, info: Any) -> dict[str, Any]:
        match info:
            case inspect.StructType():
                return self._reference(info)
            case inspect.UnionType():
                return {"anyOf": [self._schema(each) for each in info.types]}
            case inspect.ListType():
                return {"type": "array", "items": self._schema(info.item_type)}
            case inspect.DictType():
                return {"type": "object", "additionalProperties": self._schema(info.value_type)}
            case inspect.LiteralType():
                return {"enum": list(info.values)}
            case _ if type(info) in _SCALARS:
                return {**_SCALARS[type(info)]}
            case _:
                raise TypeError(f"no body has had a {type(info).__name__} so far; say here what its schema is")
