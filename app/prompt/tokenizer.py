"""Text to token ids and back, with `fastokens`, or with Hugging Face's `tokenizers` for models it does not know.

Both release the interpreter lock while they encode. A prompt's control tokens are recognised only in trusted segments
(`prompt/template.py`). In untrusted ones they are encoded as text, while the rest of the added vocabulary (Gemma's runs
of newlines, for one) matches as always: `split_special_tokens`, not `encode_segments`, which switches both off.

`fastokens` also remembers the words it has met, for each thread that encodes, and has no setting for how many. With
words of ten random characters that stops growing at 112 MB a thread, after about ten million of them (0.3.5).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import fastokens
import msgspec
import numpy as np
import structlog

from app.prompt.template import Segment, SpecialToken
from planes.wire.blocks import Tokens
from planes.wire.errors import InvalidRequest
from planes.wire.unreadable import UNREADABLE

DEFAULT_CACHE_BYTES = 16 << 20
"""About 7 MB of text: chats of 400 clients with 16,000 characters each."""


class UnusableTokenizerError(ValueError):
    """A model's tokenizer files cannot be loaded."""


class Untokenizable(InvalidRequest):
    """The tokenizer gave up on this text."""

    code = "untokenizable"


class Backend(Protocol):
    """The library underneath. Safe to call from several threads."""

    name: str

    def encode(self, text: str, *, is_trusted: bool, adds_special: bool = False) -> Tokens:
        """Raises:  ValueError if it cannot."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Control tokens included."""

    def spelling(self, token: int) -> str | None:
        """As its vocabulary writes it; None for an id that it does not know."""


class AddedToken(msgspec.Struct, frozen=True):
    """An entry of `added_tokens` in tokenizer.json."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


class _ModelPart(msgspec.Struct, frozen=True):
    vocab: dict[str, int] | list[tuple[str, float]] = {}
    unk_token: str | None = None
    byte_fallback: bool = False


class _TokenizerJson(msgspec.Struct, frozen=True):
    """As much of tokenizer.json as we look at ourselves."""

    model: _ModelPart
    added_tokens: list[AddedToken] = []
    normalizer: Any = None
    pre_tokenizer: Any = None


class Tokenizer:
    """One model's tokenizer. Every method may run on several threads at once."""

    def __init__(
        self,
        tokenizer_json: bytes,
        config: Mapping[str, Any] | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """
        Args:  tokenizer_json, config: contents of tokenizer.json and tokenizer_config.json.
        cache_bytes: bound of the cache of text between added tokens, which chats repeat; 0: none.
        Raises:  UnusableTokenizerError.
        """
        config = config or {}
        try:
            description = msgspec.json.decode(tokenizer_json, type=_TokenizerJson)
        except UNREADABLE as exc:
            raise UnusableTokenizerError(f"tokenizer.json is not valid: {exc}") from exc
        added = description.added_tokens
        if plain := _control_tokens(config) & {token.content for token in added if not token.special}:
            tokenizer_json = _with_special(tokenizer_json, plain)
            added = msgspec.json.decode(tokenizer_json, type=_TokenizerJson).added_tokens
        self._backend = _backend(tokenizer_json.decode(), cache_bytes)
        vocab = description.model.vocab
        largest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
        self.vocab_size = max([largest, *(token.id for token in added)]) + 1
        self.special_tokens = tuple(SpecialToken(t.content, t.lstrip, t.rstrip) for t in added if t.special)
        self.variables = _special_variables(config)
        self.max_chars_per_token = _max_chars_per_token(description)
        by_text = {token.content: token.id for token in added}
        self._prefix, self._suffix = self._affixes(config, by_text)

    @property
    def backend(self) -> str:
        """`fastokens` or `tokenizers`."""
        return self._backend.name

    def encode_prompt(self, text: str) -> Tokens:
        """Token ids of a raw prompt, shape (n,), uint32; control tokens spelt out in it are control tokens.

        What the model's configuration puts around a text (as a rule <bos> in front) is added unless it is there.
        Raises:  Untokenizable.
        """
        tokens = self._encode(text, is_trusted=True)
        prefix, suffix = self._prefix, self._suffix
        if len(prefix) and np.array_equal(tokens[: len(prefix)], prefix):
            prefix = prefix[:0]
        return np.concatenate((prefix, tokens, suffix)) if len(prefix) or len(suffix) else tokens

    def encode_segments(self, segments: Sequence[Segment]) -> Tokens:
        """Token ids of a rendered chat, shape (n,), uint32; the template has written <bos> itself, nothing is added.

        Raises:  Untokenizable.
        """
        if len(segments) == 1:
            return self._encode(segments[0].text, is_trusted=segments[0].is_trusted)
        if not segments:
            return np.empty(0, dtype=np.uint32)
        return np.concatenate([self._encode(segment.text, is_trusted=segment.is_trusted) for segment in segments])

    def encode_text(self, text: str) -> Tokens:
        """Token ids of a piece of text, control tokens spelt out in it included; nothing is added.

        Raises:  Untokenizable.
        """
        return self._encode(text, is_trusted=True)

    def decode(self, tokens: Tokens) -> str:
        """Text of valid token ids, control tokens included."""
        return self._backend.decode(tokens.tolist())

    def spellings(self, tokens: Tokens) -> list[str]:
        """Each token as the vocabulary writes it, such as "Ġthe"; "" for an id that has no entry."""
        return [self._backend.spelling(token) or "" for token in tokens.tolist()]

    def _encode(self, text: str, *, is_trusted: bool) -> Tokens:
        try:
            return self._backend.encode(text, is_trusted=is_trusted)
        except ValueError as exc:
            raise Untokenizable(f"The prompt cannot be tokenized: {exc}") from exc

    def _affixes(self, config: Mapping[str, Any], by_text: Mapping[str, int]) -> tuple[Tokens, Tokens]:
        """What comes before and after a raw prompt.

        The post-processor's additions, corrected by the configuration's `add_bos_token` and `add_eos_token`, if any.
        """
        plain = self._backend.encode("a", is_trusted=True)
        dressed = self._backend.encode("a", is_trusted=True, adds_special=True)
        width = len(plain)
        if not width:
            return plain, plain
        start = next((i for i in range(len(dressed) - width + 1) if np.array_equal(dressed[i : i + width], plain)), 0)
        prefix, suffix = dressed[:start], dressed[start + width :]
        if (bos := by_text.get(self.variables.get("bos_token", ""))) is not None:
            prefix = _with(prefix, bos, wanted=config.get("add_bos_token"))
        if (eos := by_text.get(self.variables.get("eos_token", ""))) is not None:
            suffix = _with(suffix, eos, wanted=config.get("add_eos_token"))
        return prefix, suffix


class _Fastokens:
    name = "fastokens"

    def __init__(self, tokenizer_json: str, cache_bytes: int) -> None:
        self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.enable_segment_cache(cache_bytes)

    def encode(self, text: str, *, is_trusted: bool, adds_special: bool = False) -> Tokens:
        packed, _ = self._tokenizer.encode_batch_flat([text], adds_special, not is_trusted)
        return np.frombuffer(packed, dtype="<u4")

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, False)
        return text

    def spelling(self, token: int) -> str | None:
        spelling: str | None = self._tokenizer.id_to_token(token)
        return spelling


class _HuggingFace:
    name = "tokenizers"

    def __init__(self, tokenizer_json: str) -> None:
        import tokenizers  # noqa: PLC0415 - 4 MB that few models need

        self._trusting = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._untrusting = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._untrusting.encode_special_tokens = True
        for tokenizer in (self._trusting, self._untrusting):
            tokenizer.no_truncation()
            tokenizer.no_padding()

    def encode(self, text: str, *, is_trusted: bool, adds_special: bool = False) -> Tokens:
        tokenizer = self._trusting if is_trusted else self._untrusting
        return np.array(tokenizer.encode(text, add_special_tokens=adds_special).ids, dtype=np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._trusting.decode(tokens, skip_special_tokens=False)

    def spelling(self, token: int) -> str | None:
        return self._trusting.id_to_token(token)


def _backend(tokenizer_json: str, cache_bytes: int) -> Backend:
    try:
        return _Fastokens(tokenizer_json, cache_bytes)
    except ValueError as exc:
        reason = str(exc)
    try:
        backend = _HuggingFace(tokenizer_json)
    # tokenizers raises bare Exception for a file it cannot use.
    except Exception as exc:
        raise UnusableTokenizerError(f"tokenizer.json cannot be used: fastokens: {reason}; tokenizers: {exc}") from exc
    structlog.get_logger().warning("tokenizer.fallback", backend=backend.name, reason=reason)
    return backend


def _special_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on: what templates may refer to. Each is a string or an object with `content`."""
    variables: dict[str, str] = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                variables[name] = text
    return variables


def _control_tokens(config: Mapping[str, Any]) -> set[str]:
    """Tokens that tokenizer_config.json calls special, whatever tokenizer.json says of them."""
    declared = config.get("added_tokens_decoder")
    entries = declared.values() if isinstance(declared, Mapping) else ()
    listed = config.get("additional_special_tokens")
    names = [entry.get("content") for entry in entries if isinstance(entry, Mapping) and entry.get("special")]
    names += [entry.get("content") if isinstance(entry, Mapping) else entry for entry in listed or ()]
    return {name for name in (*names, *_special_variables(config).values()) if isinstance(name, str)}


def _with_special(tokenizer_json: bytes, contents: set[str]) -> bytes:
    """tokenizer.json with these added tokens marked as special."""
    description = msgspec.json.decode(tokenizer_json)
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in contents
    return msgspec.json.encode(description)


def _with(tokens: Tokens, token: int, *, wanted: bool | None) -> Tokens:
    """`tokens` with `token` exactly once, or without it; None leaves things as they are."""
    if wanted is None or wanted == (token in tokens):
        return tokens
    return np.array([token, *tokens], dtype=np.uint32) if wanted else tokens[tokens != token]


def _max_chars_per_token(description: _TokenizerJson) -> int | None:
    """Most characters of text that one token can stand for; None where there is no such bound.

    A prompt of c characters then has at least c / bound tokens. There is no bound where an unknown-token can swallow
    a run, white space may vanish beside an added token, or normalizer or pre-tokenizer may drop text. NFC composes at
    most four code points into one (UAX #15).
    """
    model, added = description.model, description.added_tokens
    if not isinstance(model.vocab, dict) or (model.unk_token is not None and not model.byte_fallback):
        return None
    if any(token.lstrip or token.rstrip for token in added):
        return None
    shrink = _shrinkage(description.normalizer, {"Replace": 1, "Prepend": 1, "ByteLevel": 1, "NFC": 4, "NFD": 1})
    drop = _shrinkage(description.pre_tokenizer, {"ByteLevel": 1, "Split": 1, "Metaspace": 1, "Digits": 1})
    if shrink is None or drop is None:
        return None
    longest = max([1, *map(len, model.vocab), *(len(token.content) for token in added)])
    return longest * shrink


def _shrinkage(stage: Any, known: Mapping[str, int]) -> int | None:
    """By how much a normalizer or pre-tokenizer can shorten a text, at most; None if that is unknown."""
    if stage is None:
        return 1
    if stage.get("type") == "Sequence":
        factor = 1
        for inner in stage.get("normalizers") or stage.get("pretokenizers") or ():
            inner_factor = _shrinkage(inner, known)
            if inner_factor is None:
                return None
            factor *= inner_factor
        return factor
    if stage.get("behavior") == "Removed":
        return None
    if stage.get("type") == "Replace":
        pattern = stage.get("pattern", {}).get("String")
        if pattern is None or len(stage.get("content", "")) < len(pattern):
            return None
    return known.get(stage.get("type"))
