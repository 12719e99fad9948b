"""The fleet's LoRA adapters: what stands in etcd, and how operators change it (ADR 43).

Every gateway follows, and every worker of an adapter's model loads it and says so in its registration
(`workers/adapters.py`). Loading has succeeded when all workers that are there have said so.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

import msgspec

from app.openai.errors import ModelNotFound
from planes.adapters import read_adapter
from planes.control import ControlPlaneUnavailable
from planes.entries import NEW, Entries
from planes.wire.errors import InvalidRequest, Rejected
from planes.wire.messages import Adapter, WorkerId

_PATIENCE_S: Final = 300.0
"""How long all workers together may take to load one."""


class AdapterRefused(InvalidRequest):
    """An adapter cannot be loaded as asked."""

    code = "adapter_refused"


class AdaptersUnavailable(Rejected):
    """Adapters are in etcd, which does not answer."""

    code = "control_plane_unavailable"

    def __init__(self) -> None:
        super().__init__("Adapters are kept in etcd, which does not answer; ask again later.", retry_after_s=5.0)


class Workers(Protocol):
    """What is needed of `app.prompt.catalog.Models`."""

    def answers(self, adapter: Adapter) -> dict[WorkerId, str | None]: ...
    def changed(self) -> Coroutine[Any, Any, object]: ...


class Adapters:
    """By their names."""

    def __init__(
        self,
        entries: Entries,
        known: dict[str, Adapter],
        workers: Workers,
        *,
        new_number: Callable[[], int],
        wall_clock: Callable[[], float],
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """known: what `workers` looks adapters up in; kept up to date here."""
        self._entries = entries
        self._known = known
        self._workers = workers
        self._new_number = new_number
        self._wall_clock = wall_clock
        self._patience_s = patience_s
        self._has_changed = asyncio.Event()

    @property
    def known(self) -> Mapping[str, Adapter]:
        return self._known

    def available(self) -> list[Adapter]:
        """Those that some worker has loaded, in order of their names."""
        return [each for _, each in sorted(self._known.items()) if "" in self._workers.answers(each).values()]

    async def run(self) -> None:
        """Follow etcd until cancelled."""
        await self._entries.watch(self.take, lambda: None)

    def take(self, name: str, value: bytes | None) -> None:
        """An adapter stands in etcd; None: it is gone. One that cannot be read is none."""
        adapter = read_adapter(name, value)
        if adapter is None:
            self._known.pop(name, None)
        else:
            self._known[name] = adapter
        self._has_changed.set()

    async def load(self, name: str, path: str, parent: str, *, in_place: bool) -> None:
        """Have every worker of `parent` load it.

        Raises:  AdapterRefused if one of them cannot, if there is none, or if the name is taken (in_place: if it is a
        model's); AdaptersUnavailable. Then everything is as it was before.
        """
        adapter = self._made(name, path, parent)
        if not self._workers.answers(adapter):
            raise ModelNotFound(parent)
        before = await self._swap(name, adapter, in_place=in_place)
        try:
            async with asyncio.timeout(self._patience_s):
                await self._until_loaded(adapter)
        except TimeoutError:
            await self._restore(adapter, before)
            silent = [worker for worker, answer in self._workers.answers(adapter).items() if answer is None]
            reason = f"not loaded within {self._patience_s:g} s by {', '.join(silent) or 'this gateway'}"
            raise AdapterRefused(f"LoRA adapter {name!r}: {reason}.", param="lora_name") from None
        except BaseException:
            await self._restore(adapter, before)
            raise

    async def unload(self, name: str) -> None:
        """No new request finds it; what runs with it goes on.  Raises:  ModelNotFound, AdaptersUnavailable."""
        try:
            async with self._entries.opened() as entries:
                found = await entries.find(name)
                if found is None or not await entries.swap(name, None, revision=found.revision):
                    raise ModelNotFound(name)
        except ControlPlaneUnavailable as exc:
            raise AdaptersUnavailable from exc
        self.take(name, None)

    def _made(self, name: str, path: str, parent: str) -> Adapter:
        made = Adapter(name, parent, path, self._new_number(), int(self._wall_clock()))
        try:
            return msgspec.json.decode(msgspec.json.encode(made), type=Adapter)
        except msgspec.ValidationError as exc:
            raise AdapterRefused(f"LoRA adapter {name[:100]!r} cannot be: {exc}.", param="lora_name") from exc

    async def _swap(self, name: str, adapter: Adapter, *, in_place: bool) -> bytes | None:
        """Returns:  what stood there."""
        try:
            async with self._entries.opened() as entries:
                found = await entries.find(name)
                if found is not None and not in_place:
                    raise AdapterRefused(
                        f"The LoRA adapter {name!r} has already been loaded; unload it first, or set 'load_inplace'.",
                        param="lora_name",
                    )
                revision = NEW if found is None else found.revision
                if not await entries.swap(name, msgspec.json.encode(adapter), revision=revision):
                    raise AdapterRefused(f"Somebody else is loading {name!r} at this moment.", param="lora_name")
        except ControlPlaneUnavailable as exc:
            raise AdaptersUnavailable from exc
        return None if found is None else found.value

    async def _until_loaded(self, adapter: Adapter) -> None:
        """Raises:  AdapterRefused with what workers say."""
        while True:
            answers = self._workers.answers(adapter)
            if refusals := [f"{worker}: {answer}" for worker, answer in answers.items() if answer]:
                reasons = "; ".join(refusals)[:1000]
                raise AdapterRefused(f"LoRA adapter {adapter.name!r} was not loaded. {reasons}.", param="lora_path")
            if None not in answers.values() and self._known.get(adapter.name) == adapter:
                return
            self._has_changed.clear()
            news = [asyncio.ensure_future(each) for each in (self._workers.changed(), self._has_changed.wait())]
            try:
                await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in news:
                    each.cancel()

    async def _restore(self, adapter: Adapter, before: bytes | None) -> None:
        try:
            async with self._entries.opened() as entries:
                found = await entries.find(adapter.name)
                if found is not None and found.value == msgspec.json.encode(adapter):
                    await entries.swap(adapter.name, before, revision=found.revision)
        except ControlPlaneUnavailable as exc:
            raise AdaptersUnavailable from exc
