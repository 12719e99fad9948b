"""Keeps a model's card and files in the asset store, so that gateways can render, tokenize and refuse for it."""

import asyncio
import contextlib
from pathlib import Path

import msgspec
import structlog

from planes.assets import AssetsUnavailable, ModelCard, Store, make_card, publish_card, read_model_files, sha256
from planes.events import Connects
from planes.wire.errors import HeadraceError

_log = structlog.get_logger()

_RETRY_S = 1.0


class CardPublisher:
    """Stores the card whenever there is a connection: the store may be new, or have lost everything."""

    def __init__(self, directory: Path, card: ModelCard, store: Store, plane: Connects) -> None:
        self._directory = directory
        self._card = card
        self._store = store
        self._connected = asyncio.Event()
        plane.on_connect(self._connected.set)
        self.digest = sha256(msgspec.json.encode(card))
        """Name of the card in the store, known before it is there."""
        self.published = asyncio.Event()

    async def run(self) -> None:
        """Store, and store again after each reconnect, until cancelled."""
        while True:
            await self._connected.wait()
            self._connected.clear()
            while not await self._publish():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S):
                        await self._connected.wait()

    async def _publish(self) -> bool:
        try:
            files = await asyncio.to_thread(read_model_files, self._directory)
            await publish_card(self._store, self._card, files)
        except (HeadraceError, OSError) as exc:
            _log.warning("card.not_published", model=self._card.model, reason=str(exc))
            return False
        if not self.published.is_set():
            _log.info("card.published", model=self._card.model, digest=self.digest)
        self.published.set()
        return True


async def read_card(directory: Path, *, model: str, block_size: int) -> ModelCard:
    """Raises:  AssetsUnavailable."""
    try:
        files = await asyncio.to_thread(read_model_files, directory)
    except OSError as exc:
        raise AssetsUnavailable(f"{exc.filename}: {exc.strerror}") from exc
    return make_card(files, model=model, block_size=block_size)
