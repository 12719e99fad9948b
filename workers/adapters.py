"""LoRA adapters of a running worker: those that the fleet wants for its model, in etcd, and what became of each.

| what stands in etcd                    | this worker                                                                |
|----------------------------------------|----------------------------------------------------------------------------|
| an adapter of its model                | loads it, takes requests with it and registers so; or registers why not    |
| the same name with another number      | as if the one before had gone, and another had come                        |
| not there any more                     | goes on with it for a while: legs and migrations of requests that began    |
|                                        | before still come; once none runs it is unloaded, and registered no more   |
| there again while it still goes on     | keeps it: a swap that a worker refused is taken back so                    |

A worker that comes later finds what stands there, and does the same.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from planes.adapters import read_adapter
from planes.wire.messages import Adapter
from workers.engine.base import AdapterUnusable

_log = structlog.get_logger()

_LINGER_S = 30.0
"""How long a request that began before the end of its adapter may take to come."""

_REASON_CHARS = 1000


class AdapterEngine(Protocol):
    """What is needed of `workers.engine.base.Engine`."""

    async def load_adapter(self, adapter: Adapter) -> None: ...
    async def unload_adapter(self, adapter: Adapter) -> None: ...


class AdapterServer(Protocol):
    """What is needed of `workers.server.WorkerServer`."""

    adapters: set[int]

    async def until_without(self, adapter: int) -> None: ...


class AdapterKeeper:
    """Follows the adapters of one model.

    register: is told by number what the registration says (`Registration.adapters`).  linger_s: see `_LINGER_S`.
    """

    def __init__(
        self,
        model: str,
        engine: AdapterEngine,
        server: AdapterServer,
        register: Callable[[dict[int, str]], None],
        *,
        linger_s: float = _LINGER_S,
    ) -> None:
        self._model = model
        self._engine = engine
        self._server = server
        self._register = register
        self._linger_s = linger_s
        self._wanted: dict[str, Adapter] = {}
        self._told: dict[int, str] = {}
        """What is registered."""
        self._kept: dict[int, Adapter] = {}
        """Those that the engine has."""
        self._leaving: dict[int, asyncio.Task[None]] = {}
        self._has_changed = asyncio.Event()

    def take(self, name: str, value: bytes | None) -> None:
        """An adapter stands in etcd; None: it is gone. One that cannot be read is none."""
        self._wanted.pop(name, None)
        adapter = read_adapter(name, value)
        if adapter is not None and adapter.parent == self._model:
            self._wanted[name] = adapter
        self._has_changed.set()

    async def run(self) -> None:
        """Load and unload, one after the other, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._has_changed.wait()
                self._has_changed.clear()
                wanted = {adapter.number: adapter for adapter in self._wanted.values()}
                for number in [each for each in self._told if each in wanted and each in self._leaving]:
                    self._leaving.pop(number).cancel()  # it has come back, and nothing has been taken from it
                for number in [each for each in self._told if each not in wanted]:
                    if number not in self._kept:
                        self._tell(number, None)  # it was never loaded
                    elif number not in self._leaving:
                        self._leaving[number] = group.create_task(self._leave(self._kept[number]))
                for adapter in wanted.values():
                    if adapter.number not in self._told and adapter.number not in self._leaving:
                        await self._load(adapter)

    async def _load(self, adapter: Adapter) -> None:
        try:
            await self._engine.load_adapter(adapter)
        except AdapterUnusable as exc:
            _log.warning("adapter.refused", adapter=adapter.name, reason=str(exc))
            self._tell(adapter.number, (str(exc) or exc.code)[:_REASON_CHARS])
            return
        _log.info("adapter.loaded", adapter=adapter.name, number=adapter.number)
        self._kept[adapter.number] = adapter
        self._server.adapters.add(adapter.number)
        self._tell(adapter.number, "")

    async def _leave(self, adapter: Adapter) -> None:
        number = adapter.number
        await asyncio.sleep(self._linger_s)
        await self._server.until_without(number)
        if adapter not in self._wanted.values():
            self._server.adapters.discard(number)
            self._tell(number, None)
            del self._kept[number]
            await self._engine.unload_adapter(adapter)
            _log.info("adapter.unloaded", adapter=adapter.name, number=number)
        del self._leaving[number]
        self._has_changed.set()  # it may have come back, or gone once more, meanwhile

    def _tell(self, number: int, answer: str | None) -> None:
        told = {each: said for each, said in self._told.items() if each != number}
        self._told = told if answer is None else {**told, number: answer}
        self._register(self._told)
