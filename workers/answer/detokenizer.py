"""Tokens to text, one token at a time: whatever has not become whole characters yet is held back.

Nearly every generative tokenizer is byte-level or a sentence piece model with byte fallback, so a token is a fixed
string of bytes wherever it stands after a prompt: `Vocabulary` is that table, read from `tokenizer.json` (no
tokenizer library in memory), and text is what an incremental UTF-8 decoder makes of the bytes. For the others
`WindowDetokenizer` decodes a sliding window with the `tokenizers` library.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tokenizers import Tokenizer

from planes.wire.errors import HeadraceError
from planes.wire.unreadable import UNREADABLE

_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 8
"""More tokens than the bytes of any UTF-8 character: what is still unreadable then will stay so."""


class UnreadableTokenizer(HeadraceError):  # noqa: N818 - names what is wrong
    """The model's `tokenizer.json` is missing or no tokenizer."""

    code = "unreadable_tokenizer"


class Detokenizer(Protocol):
    """Makes text of one choice's tokens. `advance` may answer an empty string; `flush` ends it."""

    def advance(self, token: int) -> str: ...
    def flush(self) -> str: ...


class TableDetokenizer:
    """Text of tokens whose bytes stand in a table."""

    __slots__ = ("_decode", "_texts")

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._texts = texts
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def advance(self, token: int) -> str:
        return self._decode(self._texts[token])

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """Text of tokens under any decoder: what a window of tokens says more than the same window without its end."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._num_read = len(self._window)

    def advance(self, token: int) -> str:
        self._window.append(token)
        said, says = self._texts()
        if says.endswith("\ufffd") and len(self._window) - self._num_read < _WINDOW_TOKENS:
            return ""
        self._window = self._window[max(0, self._num_read - _CONTEXT_TOKENS) :]
        self._num_read = len(self._window)
        return says[len(said) :]

    def flush(self) -> str:
        said, says = self._texts()
        self._num_read = len(self._window)
        return says[len(said) :]

    def _texts(self) -> tuple[str, str]:
        read = self._window[: self._num_read]
        return self._tokenizer.decode(read), self._tokenizer.decode(self._window)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What every token id stands for.

    names: bytes of each token, special tokens included.  texts: the same, empty for special tokens, which never
    become text.  fallback: set if the table cannot give text and only serves to name tokens.
    """

    names: tuple[bytes, ...]
    texts: tuple[bytes, ...]
    fallback: Tokenizer | None = None

    def covering(self, vocab_size: int) -> "Vocabulary":
        """The same for a model whose vocabulary is larger than its tokenizer's: the ids beyond stand for nothing."""
        padding = (b"",) * max(0, vocab_size - len(self.names))
        return Vocabulary(self.names + padding, self.texts + padding, self.fallback)

    def spelling(self, tokens: frozenset[bytes]) -> "Vocabulary":
        """The same where these special tokens are text."""
        texts = tuple([name if name in tokens else text for name, text in zip(self.names, self.texts, strict=True)])
        return Vocabulary(self.names, texts, self.fallback)

    def spelling_all(self) -> "Vocabulary":
        """The same where every special token is text."""
        return Vocabulary(self.names, self.names, self.fallback)

    def detokenizer(self, context: Sequence[int]) -> Detokenizer:
        """For one choice; `context` are the prompt's last tokens."""
        if self.fallback is None:
            return TableDetokenizer(self.texts)
        return WindowDetokenizer(self.fallback, context)


def load_vocabulary(path: Path) -> Vocabulary:
    """Read a `tokenizer.json`.  Raises:  UnreadableTokenizer."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
    except OSError as exc:
        raise UnreadableTokenizer(f"{path}: {exc.strerror}") from exc
    except UNREADABLE as exc:
        raise UnreadableTokenizer(f"{path} is no tokenizer.json: {exc}") from exc
    words = file.model.words()
    names = [b""] * (1 + max([*words.values(), *(token.id for token in file.added_tokens)], default=-1))
    to_bytes = _decoder(file.decoder)
    tokenizer = None if to_bytes else Tokenizer.from_file(str(path))
    for word, token in words.items():
        names[token] = to_bytes(word) if to_bytes else word.encode()
    for added in file.added_tokens:
        names[added.id] = added.content.encode()
    texts = names.copy()
    for added in file.added_tokens:
        if added.special:
            texts[added.id] = b""
    return Vocabulary(tuple(names), tuple(texts), tokenizer)


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    """Unigram models list pieces in the order of their ids; all others map them."""

    def words(self) -> dict[str, int]:
        if isinstance(self.vocab, dict):
            return self.vocab
        return {piece: token for token, (piece, _) in enumerate(self.vocab)}


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []
    decoder: dict[str, Any] | None = None


class _Decoder:
    """Bytes of one vocabulary entry: `replace` characters, then read `<0xNN>` as a byte or all as byte-level."""

    def __init__(self) -> None:
        self.replace: list[tuple[str, str]] = []
        self.has_byte_fallback = False
        self.byte_level: dict[str, int] = {}

    def __call__(self, word: str) -> bytes:
        for old, new in self.replace:
            word = word.replace(old, new)
        if self.byte_level:
            try:
                return bytes(self.byte_level[char] for char in word)
            except KeyError:
                return word.encode()
        if self.has_byte_fallback and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return bytes.fromhex(word[3:5])
        return word.encode()


def _decoder(spec: dict[str, Any] | None) -> _Decoder | None:
    """A per-token reading of a tokenizer's decoder; None if a token's bytes depend on its neighbours."""
    decoder = _Decoder()
    if spec is None:
        return None
    for step in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        match step:
            case {"type": "ByteLevel"}:
                decoder.byte_level = _byte_level_alphabet()
            case {"type": "ByteFallback"}:
                decoder.has_byte_fallback = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                decoder.replace.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                decoder.replace.append((old, " "))
            case {"type": "Fuse"} | {"type": "Strip", "stop": 0}:
                pass  # Strip drops the space that starts a text; an answer continues its prompt's
            case _:
                return None
    return decoder


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others, in order, for U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(0x100) if byte not in printable]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}
