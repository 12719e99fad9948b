"""The `prompt` of POST /v1/completions, and its like: a text or token ids, or a list of such, from its JSON.

A list of ids may have millions, and one call into the decoder holds the interpreter's lock until it returns: so a list
is decoded in pieces, between which the event loop gets its turn (`app/prompt/prepare.py` does this on a thread).
"""

import json
import re
from typing import Final

import msgspec
import numpy as np

from app.openai.decode import check_count, check_range, shown
from app.openai.schema import Limits
from planes.wire.blocks import Tokens
from planes.wire.errors import InvalidRequest
from planes.wire.unreadable import UNREADABLE

_PIECE_BYTES: Final = 32_768
"""About half a millisecond."""
_IDS: Final = msgspec.json.Decoder(list[int])
_NO_ID: Final = re.compile(rb"(?:\A|,)\s*+(?!-?\d+\s*(?:,|\Z))")
_KINDS: Final = {
    ord('"'): "str",
    ord("["): "array",
    ord("{"): "object",
    ord("n"): "null",
    ord("t"): "bool",
    ord("f"): "bool",
}
_SHOWN_BYTES: Final = 200


def parse_prompts(raw: msgspec.Raw, limits: Limits, *, name: str = "prompt", most: int = 0) -> list[str | Tokens]:
    """Texts, or token ids (shape (n,), uint32, n >= 1): one at least. A list of one prompt is that prompt.

    Args:  raw: a JSON value whose syntax has been checked.  name: of the field.  most: prompts; 0: what limits say.
    Raises:  InvalidRequest.
    """
    text = bytes(raw)
    if text.startswith(b'"'):
        return [_text(text)]
    if not text.startswith(b"["):
        raise _wrong_type(name, "str or array", text)
    inner = text[1:_PIECE_BYTES].lstrip()
    if inner.startswith(b"]"):
        raise InvalidRequest(f"Invalid '{name}': it must not be an empty list.", param=name)
    if not inner.startswith((b'"', b"[")):
        return [_token_ids(text, name)]
    prompts = msgspec.json.decode(text, type=list[msgspec.Raw])
    check_count(name, len(prompts), most or limits.num_prompts, "prompts")
    return [_one(bytes(prompt), f"{name}[{index}]") for index, prompt in enumerate(prompts)]


def parse_token_ids(raw: msgspec.Raw, *, name: str) -> Tokens:
    """Shape (n,), uint32, n >= 1.  Raises:  InvalidRequest.  Args:  as above."""
    text = bytes(raw)
    if text.startswith(b"["):
        return _token_ids(text, name)
    raise _wrong_type(name, "array", text)


def _one(text: bytes, name: str) -> str | Tokens:
    """Of a list of prompts, which may mix texts and token ids."""
    if text.startswith(b'"'):
        return _text(text)
    if text.startswith(b"["):
        return _token_ids(text, name)
    raise _wrong_type(name, "str or array", text)


def _text(text: bytes) -> str:
    try:
        return msgspec.json.decode(text, type=str)
    except UNREADABLE as exc:
        raise InvalidRequest(f"The request body is not valid JSON: {exc}.", code="invalid_json") from exc


def _token_ids(text: bytes, name: str) -> Tokens:
    """Of a JSON list."""
    pieces: list[Tokens] = []
    num_ids, at, end = 0, 1, len(text) - 1
    while at < end:
        cut = text.find(b",", min(at + _PIECE_BYTES, end), end)
        cut = end if cut < 0 else cut
        try:
            ids = _IDS.decode(b"[%b]" % text[at:cut])
        except UNREADABLE as exc:
            raise _not_an_id(text, name, at, cut, num_ids) from exc
        if ids:
            check_range(name, min(ids), 0, 2**32 - 1)
            check_range(name, max(ids), 0, 2**32 - 1)
        pieces.append(np.array(ids, dtype=np.uint32))
        num_ids += len(ids)
        at = cut + 1
    if not num_ids:
        raise InvalidRequest(f"Invalid '{name}': it must hold at least one token id.", param=name)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _not_an_id(text: bytes, name: str, at: int, cut: int, num_ids: int) -> InvalidRequest:
    """Why text[at:cut], with `num_ids` ids before it, is no list of ids."""
    piece = text[at:cut]
    found = _NO_ID.search(piece)
    if found is None:
        return InvalidRequest(f"Invalid '{name}': it is no list of token ids.", param=name, code="invalid_type")
    value = text[at + found.end() :]
    if value.startswith((b'"', b"[")):
        return InvalidRequest(
            f"Invalid '{name}': it mixes token ids with {_value(value)}; send only ids or only text.",
            param=name,
            code="invalid_type",
        )
    return _wrong_type(f"{name}[{num_ids + piece.count(b',', 0, found.end())}]", "int", value)


def _wrong_type(name: str, expected: str, text: bytes) -> InvalidRequest:
    """text: begins with the value that was given."""
    return InvalidRequest(
        f"Invalid type for '{name}': expected {expected}, got {_kind(text)}; the value is {_value(text)}.",
        param=name,
        code="invalid_type",
    )


def _kind(text: bytes) -> str:
    return _KINDS.get(text[0], "float" if re.match(rb"-?\d+[.eE]", text) else "int")


def _value(text: bytes) -> str:
    """The value that `text` begins with, as an error message quotes it."""
    beginning = text[:_SHOWN_BYTES].decode("utf-8", "replace")
    try:
        return shown(json.JSONDecoder().raw_decode(beginning)[0])
    except (ValueError, RecursionError):
        return f"{beginning[:59]}…"
