"""From bytes to a typed body, or to an `InvalidRequest` that names the field, its value and what is allowed."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import msgspec

from planes.wire.errors import InvalidRequest
from planes.wire.unreadable import UNREADABLE

Body = TypeVar("Body", bound=msgspec.Struct)
Value = TypeVar("Value")

_PATH = re.compile(r"(?P<problem>.*?) - at (?:`key` in )?`\$\.?(?P<path>.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`$", re.DOTALL)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STEP = re.compile(r"\[(\d+)\]|([^.\[]+)")
_SHOWN_CHARS = 60
_QUOTED_BYTES = 16_384
"""Longest body that is decoded once more to quote the value that is wrong."""


def decode(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Raises:  InvalidRequest for anything that is not a JSON object of the decoder's type."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise _explained(str(exc), body, decoder.type) from exc
    except RecursionError as exc:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from exc
    except UNREADABLE as exc:
        raise InvalidRequest(f"The request body is not valid JSON: {exc}.", code="invalid_json") from exc


def decode_known(
    body: bytes, decoder: msgspec.json.Decoder[Body], nested: Mapping[str, type[msgspec.Struct]], *, is_strict: bool
) -> tuple[Body, tuple[str, ...]]:
    """Also the names of the fields that nobody knows, which are left out; with `is_strict` they are refused.

    A body without such fields costs nothing more; one with them is decoded twice.
    Args:  decoder: of a type that forbids unknown fields.  nested: fields that are objects of such types.
    Raises:  InvalidRequest.
    """
    try:
        return decoder.decode(body), ()
    except UNREADABLE as exc:
        if is_strict or not _UNKNOWN.match(str(exc).rpartition(" - at ")[0] or str(exc)):
            return decode(body, decoder), ()
    ignored: list[str] = []
    kind = cast("type[msgspec.Struct]", decoder.type)  # a TypeForm to msgspec 0.23, not yet to 0.22
    known = _known(body, kind, nested, "", ignored)
    return decode(known, decoder), tuple(ignored)


def _known(
    body: bytes, kind: type[msgspec.Struct], nested: Mapping[str, type[msgspec.Struct]], prefix: str, ignored: list[str]
) -> bytes:
    """The same JSON object without the fields that `kind` does not have, whose names are added to `ignored`."""
    try:
        given = _OBJECT.decode(body)
    except UNREADABLE:
        return body  # what is wrong with it is told when it is decoded
    kept: dict[str, msgspec.Raw] = {}
    for name, raw in given.items():
        if name not in kind.__struct_fields__:
            ignored.append(prefix + name)
        elif name in nested and (text := bytes(raw)).startswith(b"{"):
            kept[name] = msgspec.Raw(_known(text, nested[name], {}, f"{name}.", ignored))
        else:
            kept[name] = raw
    return msgspec.json.encode(kept)


def decode_field(name: str, raw: msgspec.Raw, decoder: msgspec.json.Decoder[Value]) -> Value:
    """One field of a body that has been decoded.  Raises:  InvalidRequest naming it."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as exc:
        raise _explained(str(exc), bytes(raw), decoder.type, within=name) from exc
    except RecursionError as exc:
        raise InvalidRequest(f"'{name}' is nested too deeply.", param=name, code="invalid_json") from exc
    except UNREADABLE as exc:
        raise InvalidRequest(f"The request body is not valid JSON: {exc}.", code="invalid_json") from exc


def missing(name: str) -> InvalidRequest:
    """A field that must be there is not."""
    return InvalidRequest(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def not_text(name: str, kind: str) -> InvalidRequest:
    """The piece of content of this name is of a kind that is no text."""
    return InvalidRequest(
        f"Invalid '{name}.type': {shown(kind)} content is not supported; only text is.",
        param=f"{name}.type",
        code="unsupported_parameter",
    )


def shown(value: Any) -> str:
    """A value as an error message quotes it: JSON, cut to a readable length."""
    try:
        text = msgspec.json.encode(value).decode("utf-8", "replace")
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"


def check_range(name: str, value: float, low: float, high: float, *, is_low_open: bool = False) -> None:
    """Raises:  InvalidRequest unless low <= value <= high (low < value if `is_low_open`); NaN is in no range."""
    if low <= value <= high and not (is_low_open and value == low):
        return
    if high == math.inf:
        allowed = f"{'more than' if is_low_open else 'at least'} {_bound(low)}"
    else:
        above, below = ("more than", "and at most") if is_low_open else ("from", "to")
        allowed = f"{above} {_bound(low)} {below} {_bound(high)}"
    raise InvalidRequest(f"Invalid '{name}': {shown(value)} is out of range; it must be {allowed}.", param=name)


def _bound(value: float) -> str:
    """A whole one to the digit, and however large: it may be another field's value, and more than a float holds."""
    return shown(value) if isinstance(value, int) else f"{value:g}"


def check_count(name: str, count: int, limit: int, what: str) -> None:
    """Raises:  InvalidRequest if there are more than `limit`."""
    if count > limit:
        raise InvalidRequest(f"Invalid '{name}': {count} {what} were given and the limit is {limit}.", param=name)


def _explained(problem: str, body: bytes, expected: Any, *, within: str = "") -> InvalidRequest:
    """Put msgspec's message, such as "Expected `int`, got `str` - at `$.n`", into OpenAI's words.

    Args:  within: the field whose value `body` is; "": it is the whole.
    """
    located = _PATH.match(problem)
    inner = located["path"].removesuffix("[...]") if located else ""
    path = f"{within}{'.' if within and inner and not inner.startswith('[') else ''}{inner}"
    problem = located["problem"] if located else problem
    prefix = f"{path}." if path else ""
    if unknown := _UNKNOWN.match(problem):
        known = expected.__struct_fields__ if not path else ()
        close = difflib.get_close_matches(unknown["name"][:100], known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        name = prefix + unknown["name"][:200]
        return InvalidRequest(
            f"Unrecognized request argument supplied: {name}.{hint}", param=name, code="unknown_parameter"
        )
    if absent := _MISSING.match(problem):
        return missing(prefix + absent["name"])
    problem = problem[:1].lower() + problem[1:].replace("`", "")
    if not path:
        return InvalidRequest(f"The request body must be a JSON object: {problem}.", code="invalid_type")
    value = _at(body, inner)
    found = "" if value is msgspec.UNSET else f"; the value is {shown(value)}"
    return InvalidRequest(f"Invalid type for '{path}': {problem}{found}.", param=path, code="invalid_type")


def _at(body: bytes, path: str) -> Any:
    """The value that the error is about; UNSET if the body is long or cannot be read to its end."""
    if len(body) > _QUOTED_BYTES:
        return msgspec.UNSET
    try:
        value = msgspec.json.decode(body)
    except UNREADABLE:
        return msgspec.UNSET
    for index, key in _STEP.findall(path):
        if isinstance(value, list) and index and int(index) < len(value):
            value = value[int(index)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return msgspec.UNSET
    return value
