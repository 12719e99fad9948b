"""A smallest instance of a JSON Schema: what the simulated model says when asked for JSON. Always the same."""

import math
from collections.abc import Callable, Mapping
from typing import Any

_FORMATS = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uri": "http://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_MAX_DEPTH = 64
_MAX_ITEMS = 1000
_UNKNOWN = (
    "pattern",
    "not",
    "if",
    "contains",
    "patternProperties",
    "propertyNames",
    "dependentSchemas",
    "minProperties",
)


class NoInstance(ValueError):  # noqa: N818 - names what is wrong
    """The simulated engine cannot make up what would match."""


def instance_of(schema: Mapping[str, Any]) -> Any:
    """Of all properties the required ones, of every choice the first.  Raises:  NoInstance."""
    try:
        return _Instances(schema).of(schema, 0)
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError) as exc:
        raise NoInstance(f"it is no schema: {exc}") from exc


class _Instances:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def of(self, schema: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise NoInstance(f"its smallest instance is nested more than {_MAX_DEPTH} levels deep")
        if not isinstance(schema, Mapping):
            if schema is True:
                return {}
            raise NoInstance(f"{schema!r} is no schema that anything matches")
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._first(schema["enum"], "enum")
        simpler = self._simpler(schema, depth)
        return self._of_type(schema, depth) if simpler is None else self.of(simpler, depth + 1)

    def _simpler(self, schema: Mapping[str, Any], depth: int) -> Any:
        """Less one reference or choice; None: it has none."""
        if "$ref" in schema:
            return self._resolved(schema["$ref"])
        for word in ("anyOf", "oneOf"):
            if word in schema:
                rest = {key: value for key, value in schema.items() if key != word}
                return self._merged(rest, self._first(schema[word], word), depth)
        if "allOf" not in schema:
            return None
        merged: Mapping[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            merged = self._merged(merged, part, depth)
        return merged

    def _of_type(self, schema: Mapping[str, Any], depth: int) -> Any:
        for word in _UNKNOWN:
            if word in schema:
                raise NoInstance(f"the simulated engine does not know {word}")
        kind = schema.get("type", "array" if "items" in schema or "prefixItems" in schema else "object")
        if isinstance(kind, list):
            kind = self._first(kind, "type")
        makers: dict[str, Callable[[], Any]] = {
            "object": lambda: self._object(schema, depth),
            "array": lambda: self._array(schema, depth),
            "string": lambda: self._string(schema),
            "integer": lambda: _number(schema, is_integer=True),
            "number": lambda: _number(schema, is_integer=False),
            "boolean": lambda: False,
            "null": lambda: None,
        }
        if kind not in makers:
            raise NoInstance(f"{kind!r} is no type")
        return makers[kind]()

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        known, required = schema.get("properties", {}), schema.get("required", [])
        names = [*(name for name in known if name in required), *(name for name in required if name not in known)]
        return {name: self.of(known.get(name, {}), depth + 1) for name in names}

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        first, least = schema.get("prefixItems", []), schema.get("minItems", 0)
        num_items = max(least, len(first))
        if num_items > _MAX_ITEMS:
            raise NoInstance(f"minItems is {least}; the simulated engine makes up to {_MAX_ITEMS}")
        kinds = [*first, *([schema.get("items", {})] * (num_items - len(first)))]
        items = [self.of(kind, depth + 1) for kind in kinds]
        if schema.get("uniqueItems") and any(item in items[:place] for place, item in enumerate(items)):
            raise NoInstance("the simulated engine makes up no different items for uniqueItems")
        return items

    @staticmethod
    def _string(schema: Mapping[str, Any]) -> str:
        text = ""
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise NoInstance(f"the simulated engine does not know the format {schema['format']!r}")
            text = _FORMATS[schema["format"]]
        least = schema.get("minLength", 0)
        if least > _MAX_ITEMS:
            raise NoInstance(f"minLength is {least}; the simulated engine makes up to {_MAX_ITEMS}")
        return text or "a" * least

    def _merged(self, schema: Mapping[str, Any], part: Any, depth: int) -> Mapping[str, Any]:
        while isinstance(part, Mapping) and "$ref" in part:
            depth += 1
            if depth > _MAX_DEPTH:
                raise NoInstance("its references go round")
            part = self._resolved(part["$ref"]) | {key: value for key, value in part.items() if key != "$ref"}
        if not isinstance(part, Mapping):
            return schema if part is True else {"type": "never"}
        properties = {**schema.get("properties", {}), **part.get("properties", {})}
        required = [*schema.get("required", []), *part.get("required", [])]
        both = {**schema, **part}
        return both | ({"properties": properties} if properties else {}) | ({"required": required} if required else {})

    def _resolved(self, reference: Any) -> Any:
        found: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise NoInstance(f"the reference {reference!r} leads out of the schema")
        for step in reference[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise NoInstance(f"the reference {reference!r} leads nowhere")
            found = found[name]
        return found

    @staticmethod
    def _first(choices: Any, word: str) -> Any:
        if not isinstance(choices, list) or not choices:
            raise NoInstance(f"{word} is no list with something in it")
        return choices[0]


def _number(schema: Mapping[str, Any], *, is_integer: bool) -> int | float:
    """The one nearest to zero."""
    step, low, high = schema.get("multipleOf", 1), schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if "exclusiveMinimum" in schema:
        low = max(low, schema["exclusiveMinimum"] + step)
    if "exclusiveMaximum" in schema:
        high = min(high, schema["exclusiveMaximum"] - step)
    value = step * math.ceil(low / step) if low > 0 else step * math.floor(high / step) if high < 0 else 0
    if not low <= value <= high:
        if is_integer or "multipleOf" in schema or not low <= high:
            raise NoInstance("the simulated engine finds no number within its bounds")
        value = (low + high) / 2
    return value
