"""Keeps a model's card and files in the asset store, so that gateways can render, tokenize and refuse for it."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import msgspec
import structlog

from planes.assets import (
    AssetsUnavailable,
    ModelCard,
    Store,
    chat_template,
    make_card,
    publish_card,
    read_model_files,
    sha256,
)
from planes.events import Connects
from planes.wire.errors import HeadraceError
from planes.wire.unreadable import UNREADABLE
from workers.parsers import NO_PARSERS, ParserNames, parser_names

_log = structlog.get_logger()

_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.5, 10.0
"""Between two attempts to store it."""
_LOOK_S = 10.0
"""How often a stored card is looked for: the store may have been emptied while everybody stayed connected."""


class _ResponseTemplate(msgspec.Struct, frozen=True):
    fields: dict[str, Any] = {}


class _TokenizerConfig(msgspec.Struct, frozen=True):
    """What `tokenizer_config.json` says of how answers are read."""

    response_template: _ResponseTemplate | None = None


class CardPublisher:
    """Stores the card whenever there is a connection: the store may be new, or have lost everything."""

    def __init__(
        self, directory: Path, card: ModelCard, store: Store, plane: Connects, *, look_s: float = _LOOK_S
    ) -> None:
        self._directory = directory
        self._card = card
        self._store = store
        self._look_s = look_s
        self._failing_because = ""
        """Why it could not be stored last time; said once."""
        self._connected = asyncio.Event()
        plane.on_connect(self._connected.set)
        self.digest = sha256(msgspec.json.encode(card))
        """Name of the card in the store, known before it is there."""
        self.published = asyncio.Event()

    async def run(self) -> None:
        """Store, and look again after each reconnect and from time to time, until cancelled."""
        pause_s = _LEAST_PAUSE_S
        while True:
            await self._connected.wait()
            self._connected.clear()
            while True:
                is_stored = await self._is_stored() or await self._publish()
                pause_s = _LEAST_PAUSE_S if is_stored else min(_MOST_PAUSE_S, 2 * pause_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._look_s if is_stored else pause_s):
                        await self._connected.wait()
                        self._connected.clear()

    async def _is_stored(self) -> bool:
        """Whether all of it was there, and still is."""
        if not self.published.is_set():
            return False
        try:
            for name in (*self._card.files.values(), self.digest):
                if not await self._store.has(name):
                    _log.warning("card.lost", model=self._card.model, digest=self.digest, missing=name)
                    return False
        except HeadraceError:
            return False  # storing it tells what is wrong
        return True

    async def _publish(self) -> bool:
        try:
            files = await asyncio.to_thread(read_model_files, self._directory)
            await publish_card(self._store, self._card, files)
        except (HeadraceError, OSError) as exc:
            if (reason := str(exc)) != self._failing_because:
                _log.warning("card.not_published", model=self._card.model, reason=reason)
            self._failing_because = reason
            return False
        if not self.published.is_set() or self._failing_because:
            _log.info("card.published", model=self._card.model, digest=self.digest)
        self._failing_because = ""
        self.published.set()
        return True


async def read_card(
    directory: Path,
    *,
    model: str,
    block_size: int,
    parsers: ParserNames = NO_PARSERS,
    embedding_size: int = 0,
    is_matryoshka: bool = False,
    matryoshka_dimensions: tuple[int, ...] = (),
) -> ModelCard:
    """Raises:  AssetsUnavailable."""
    files = await asyncio.to_thread(_files, directory)
    return make_card(
        files,
        model=model,
        block_size=block_size,
        tool_parser=parsers.tool,
        reasoning_parser=parsers.reasoning,
        embedding_size=embedding_size,
        is_matryoshka=is_matryoshka,
        matryoshka_dimensions=matryoshka_dimensions,
    )


def read_parser_names(directory: Path, tool: str, reasoning: str, *, engine: str) -> ParserNames:
    """What a worker's flags come to for the model there. Blocks.  Raises:  AssetsUnavailable."""
    files = _files(directory)
    try:
        template = chat_template(files) or ""
        config = msgspec.json.decode(files.get("tokenizer_config.json", b"{}"), type=_TokenizerConfig)
    except UNREADABLE as exc:
        raise AssetsUnavailable(f"{directory / 'tokenizer_config.json'} cannot be used: {exc}") from exc
    responses = config.response_template if engine == "vllm" else None
    return parser_names(tool, reasoning, template, None if responses is None else responses.fields)


def _files(directory: Path) -> dict[str, bytes]:
    try:
        return read_model_files(directory)
    except OSError as exc:
        raise AssetsUnavailable(f"{exc.filename}: {exc.strerror}") from exc
