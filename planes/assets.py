"""Model cards and tokenizer files: from a worker's disk to every gateway, by digest, without a shared file system.

A card names a model's files by sha256. Cards and files are objects named by their own digest, so that storing one twice
changes nothing, what arrives can be checked, and a gateway keeps what it has fetched.
"""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from planes.wire.errors import HeadraceError
from planes.wire.unreadable import UNREADABLE

FILES_OF_INTEREST = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


class AssetsUnavailable(HeadraceError):  # noqa: N818 - names the outcome, as the style guide asks
    """A card or a file could not be had in time, or is not what its name says."""

    code = "assets_unavailable"


class ModelCard(msgspec.Struct, frozen=True):
    """What a gateway needs of a model. `files` maps a file's name to its sha256 in hex, in order of names.

    Workers with one card can take each other's requests: the same tokens, named in blocks of one size. What only bounds
    them, such as the context, is a fact of each worker.
    """

    model: str
    eos_token_ids: list[int]
    files: dict[str, str]
    block_size: int = 0
    """Tokens in the blocks by which prompts for its workers are named; 0: a card from before it was told."""
    tool_parser: str = ""
    """What reads tool calls in its workers' answers; "": nothing does."""
    reasoning_parser: str = ""
    """What tells thoughts from answers there; "": nothing does."""
    embedding_size: int = 0
    """Numbers in the vectors that its workers make of prompts; 0: they generate."""
    is_matryoshka: bool = False
    """Whether a vector's first numbers are one by themselves."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """If so: how many of them; none: any number."""


@dataclass(frozen=True, slots=True)
class LoadedCard:
    """A card and the bytes of all its files, by name."""

    digest: str
    card: ModelCard
    files: Mapping[str, bytes]


class Store(Protocol):
    """Where objects are; `planes.objects.ObjectStore` is one."""

    async def has(self, name: str) -> bool:
        """Whether there is an object of this name."""

    async def put(self, name: str, data: bytes) -> None:
        """Store it, unless it is there."""

    async def get(self, name: str) -> bytes:
        """Its bytes."""


def read_model_files(directory: Path) -> dict[str, bytes]:
    """The files of interest that are there. Blocks.  Raises:  AssetsUnavailable without a tokenizer.json."""
    files = {name: (directory / name).read_bytes() for name in FILES_OF_INTEREST if (directory / name).is_file()}
    if "tokenizer.json" not in files:
        raise AssetsUnavailable(
            f"{directory} has no tokenizer.json, only {sorted(files) or 'none of the files of a model'}"
        )
    return files


def make_card(
    files: Mapping[str, bytes],
    *,
    model: str,
    block_size: int,
    tool_parser: str = "",
    reasoning_parser: str = "",
    embedding_size: int = 0,
    is_matryoshka: bool = False,
    matryoshka_dimensions: tuple[int, ...] = (),
) -> ModelCard:
    """Describe a model's files; the end-of-sequence tokens are its generation config's, else its config's.

    Raises:  AssetsUnavailable if one of these two files is not what it should be.
    """
    digests = {name: sha256(files[name]) for name in sorted(files)}
    return ModelCard(
        model,
        _eos_token_ids(files),
        digests,
        block_size,
        tool_parser,
        reasoning_parser,
        embedding_size,
        is_matryoshka,
        matryoshka_dimensions,
    )


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """The source of a model's chat template; where there are several, of the one named default.

    Raises:  msgspec.DecodeError if tokenizer_config.json is no JSON object.
    """
    if (file := files.get("chat_template.jinja")) is not None:
        return file.decode(errors="replace")
    config = msgspec.json.decode(files.get("tokenizer_config.json", b"{}"), type=dict[str, Any])
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


async def publish_card(store: Store, card: ModelCard, files: Mapping[str, bytes], *, timeout_s: float = 120.0) -> str:
    """Store the files, then the card. Storing what is there already costs one request a file.

    Returns:  the card's digest.  Raises:  AssetsUnavailable when the time is over; the store's own errors.
    """
    encoded = msgspec.json.encode(card)
    try:
        async with asyncio.timeout(timeout_s):
            for name, digest in card.files.items():
                await store.put(digest, files[name])
            await store.put(sha256(encoded), encoded)
    except TimeoutError:
        raise AssetsUnavailable(f"the card of {card.model} could not be stored within {timeout_s} s") from None
    return sha256(encoded)


async def fetch_card(store: Store, digest: str, cache_dir: Path, *, timeout_s: float = 120.0) -> LoadedCard:
    """A card and its files, from `cache_dir` where it has them.

    Raises:  AssetsUnavailable when the time is over or a file is not what the card says; the store's own errors.
    """
    try:
        async with asyncio.timeout(timeout_s):
            encoded = await _fetch(store, digest, cache_dir)
            try:
                card = msgspec.json.decode(encoded, type=ModelCard)
            except UNREADABLE as exc:
                raise AssetsUnavailable(f"model card {digest} is malformed: {exc}") from exc
            wanted = {name: digest for name, digest in card.files.items() if name in FILES_OF_INTEREST}
            files = {name: await _fetch(store, digest, cache_dir) for name, digest in wanted.items()}
    except TimeoutError:
        raise AssetsUnavailable(f"model card {digest} could not be fetched within {timeout_s} s") from None
    return LoadedCard(digest, card, files)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _fetch(store: Store, digest: str, cache_dir: Path) -> bytes:
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):  # it becomes a file's name
        raise AssetsUnavailable(f"{digest!r} is no sha256 in hex")
    cached = await asyncio.to_thread(_read_cached, cache_dir / digest)
    if cached is not None:
        return cached
    data = await store.get(digest)
    if (found := await asyncio.to_thread(sha256, data)) != digest:
        raise AssetsUnavailable(f"object {digest} holds {len(data)} bytes with the digest {found}")
    await asyncio.to_thread(_write_cached, cache_dir / digest, data)
    return data


def _read_cached(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if sha256(data) == path.name else None


def _write_cached(path: Path, data: bytes) -> None:
    """All or nothing, also beside another process; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)


class _EosConfig(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


def _eos_token_ids(files: Mapping[str, bytes]) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        if name not in files:
            continue
        try:
            found = msgspec.json.decode(files[name], type=_EosConfig).eos_token_id
        except UNREADABLE as exc:
            raise AssetsUnavailable(f"{name} is malformed: {exc}") from exc
        if found is not None:
            return [found] if isinstance(found, int) else found
    return []
