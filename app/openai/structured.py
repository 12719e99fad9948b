"""What an answer must match: `response_format`, vLLM's `structured_outputs`, and `guided_*`, its older names."""

from operator import attrgetter
from typing import Final

import msgspec

from app.openai.bodies import CommonBody
from app.openai.decode import check_count, decode_field, missing, shown
from app.openai.schema import NULL, Limits
from planes.wire.errors import InvalidRequest
from planes.wire.frames import StructuredOutput

ANY_OBJECT: Final = StructuredOutput(json_schema='{"type":"object"}')

_FIELDS: Final = {
    "response_format": "",
    "structured_outputs": "",
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_GIVEN: Final = attrgetter(*_FIELDS)


class _JsonSchema(msgspec.Struct, frozen=True):
    schema: msgspec.Raw = NULL


class _ResponseFormat(msgspec.Struct, frozen=True):
    type: str
    json_schema: _JsonSchema | None = None


class _Structured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's `StructuredOutputsParams`."""

    json: msgspec.Raw = NULL
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: msgspec.Raw = NULL
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


_STRING: Final = msgspec.json.Decoder(str)
_RESPONSE_FORMAT: Final = msgspec.json.Decoder(_ResponseFormat)
_STRUCTURED: Final = msgspec.json.Decoder(_Structured)
_ANYTHING: Final = msgspec.json.Decoder(dict[str, msgspec.Raw] | bool)


def parse_structured(body: CommonBody, limits: Limits) -> StructuredOutput | None:
    """None: anything may be answered.  Raises:  InvalidRequest, also if several fields say what must be matched."""
    given = _GIVEN(body)
    if given.count(NULL) == len(given):
        return None
    found: dict[str, StructuredOutput] = {}
    for (name, inner), raw in zip(_FIELDS.items(), given, strict=True):
        if raw == NULL:
            continue
        check_count(name, len(raw), limits.schema_bytes, "bytes")
        if name == "response_format":
            structured = response_format(raw)
        else:
            value = raw if not inner else msgspec.Raw(b'{"%b":%b}' % (inner.encode(), raw))
            structured = _structured(name, decode_field(name, value, _STRUCTURED))
        if structured is not None:
            found[name] = structured
    if len(found) > 1:
        raise InvalidRequest(
            f"{' and '.join(map(repr, found))} both say what the answer must match; send one of them.",
            param=next(iter(found)),
        )
    return next(iter(found.values()), None)


def response_format(raw: msgspec.Raw) -> StructuredOutput | None:
    """Raises:  InvalidRequest."""
    name = "response_format"
    wanted = decode_field(name, raw, _RESPONSE_FORMAT)
    match wanted.type:
        case "text":
            return None
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema == NULL:
                raise missing(f"{name}.json_schema" + (".schema" if wanted.json_schema is not None else ""))
            return StructuredOutput(json_schema=schema_text(f"{name}.json_schema.schema", wanted.json_schema.schema))
        case "structural_tag":
            return StructuredOutput(structural_tag=schema_text(name, raw))
    raise InvalidRequest(
        f"Invalid '{name}.type': {shown(wanted.type)} is not one of text, json_object, json_schema, structural_tag.",
        param=f"{name}.type",
    )


def _structured(name: str, wanted: _Structured) -> StructuredOutput | None:
    for option in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
        if getattr(wanted, option):
            raise InvalidRequest(
                f"'{name}.{option}' is not supported here; leave it out.",
                param=f"{name}.{option}",
                code="unsupported_parameter",
            )
    found = [
        *([StructuredOutput(json_schema=schema_text(name, wanted.json))] if wanted.json != NULL else ()),
        *([ANY_OBJECT] if wanted.json_object else ()),
        *([StructuredOutput(regex=_some(name, wanted.regex))] if wanted.regex is not None else ()),
        *([StructuredOutput(grammar=_some(name, wanted.grammar))] if wanted.grammar is not None else ()),
        *([StructuredOutput(choice=_choices(name, wanted.choice))] if wanted.choice is not None else ()),
        *([StructuredOutput(structural_tag=schema_text(name, tag))] if (tag := wanted.structural_tag) != NULL else ()),
    ]
    if len(found) > 1:
        raise InvalidRequest(f"Invalid '{name}': {len(found)} constraints were given and the limit is 1.", param=name)
    if not found and wanted.json_object is None:
        raise InvalidRequest(
            f"Invalid '{name}': it needs one of json, regex, choice, grammar, json_object, structural_tag.", param=name
        )
    return found[0] if found else None


def _choices(name: str, choices: list[str]) -> list[str]:
    if not choices or "" in choices:
        raise InvalidRequest(
            f"Invalid '{name}': a list of choices holds at least one, and none that is empty; "
            f"the value is {shown(choices)}.",
            param=name,
        )
    return choices


def json_schema(name: str, raw: msgspec.Raw, limits: Limits) -> StructuredOutput:
    """A schema that stands in a body by itself.  Raises:  InvalidRequest."""
    if raw == NULL:
        raise missing(name)
    check_count(name, len(raw), limits.schema_bytes, "bytes")
    return StructuredOutput(json_schema=schema_text(name, raw))


def schema_text(name: str, raw: msgspec.Raw) -> str:
    """Of a JSON schema, which may be written as a string with JSON in it; word for word.  Raises:  InvalidRequest."""
    text = bytes(raw)
    if text.startswith(b'"'):
        text = decode_field(name, raw, _STRING).encode(errors="surrogatepass")
    decode_field(name, msgspec.Raw(text), _ANYTHING)
    try:
        return text.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"Invalid '{name}': it is not valid UTF-8.", param=name) from exc


def _some(name: str, text: str) -> str:
    if not text:
        raise InvalidRequest(f"Invalid '{name}': it must not be empty.", param=name)
    return text
