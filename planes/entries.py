"""Values in etcd that several processes change: `/headrace/{namespace}/{kind}/{name}`, each with its revision.

Whoever changes a value names the revision that they have read; if somebody else was faster, nothing happens. A name may
have slashes in it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from planes.control import Etcd, watch_keys
from planes.wire.names import check_namespace

ADAPTERS: Final = "adapters"
"""Kind of `planes.wire.messages.Adapter`, by its name."""
NEW: Final = 0
"""The revision of what is not there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value as it was read."""

    value: bytes
    revision: int


class OpenEntries:
    """The entries of one kind over one connection. Every method raises what the client does; the session knows it."""

    def __init__(self, client: Any, prefix: bytes) -> None:
        self._client = client
        self._prefix = prefix

    async def list(self, start: str = "", end: str | None = None) -> dict[str, Entry]:
        """By name, in order: those from `start` to before `end`, or to the last one."""
        last = _after(self._prefix) if end is None else self._prefix + end.encode()
        found = await self._client.get_range(self._prefix + start.encode(), last)
        return {self._name(entry.key): Entry(entry.value, entry.mod_revision) for entry in found}

    async def find(self, name: str) -> Entry | None:
        found = next(iter(await self._client.get_range(self._prefix + name.encode(), None)), None)
        return None if found is None else Entry(found.value, found.mod_revision)

    async def swap(self, name: str, value: bytes | None, *, revision: int) -> bool:
        """Put `value` (None: nothing) in the place of what was read with this revision.

        Returns:  whether that was still there.
        """
        key, transactions = self._prefix + name.encode(), self._client.transactions
        change = transactions.delete(key) if value is None else transactions.put(key, value)
        is_done, _ = await self._client.transaction([transactions.mod(key) == revision], success=[change], failure=[])
        return bool(is_done)

    async def drop(self, end: str) -> None:
        """Delete all whose names are before `end`."""
        await self._client.delete_range(self._prefix, self._prefix + end.encode())

    def _name(self, key: bytes) -> str:
        return key[len(self._prefix) :].decode(errors="replace")


class Entries:
    """The entries of one kind in one namespace."""

    def __init__(self, etcd: Etcd, namespace: str, kind: str) -> None:
        self._etcd = etcd
        self._kind = kind
        self._prefix = f"/headrace/{check_namespace(namespace)}/{kind}/".encode()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[OpenEntries]:
        """Raises:  ControlPlaneUnavailable for every error of etcd inside the block."""
        async with self._etcd.session() as client:
            yield OpenEntries(client, self._prefix)

    async def keep(self, work: Callable[[OpenEntries, Callable[[], None]], Awaitable[None]]) -> None:
        """Run `work(entries, healthy)` in a new session after each failure, as `Etcd.keep`."""
        await self._etcd.keep(self._kind, lambda client, healthy: work(OpenEntries(client, self._prefix), healthy))

    async def watch(self, on_change: Callable[[str, bytes | None], None], on_listed: Callable[[], None]) -> None:
        """Call `on_change` with each value there is and each that changes (None: it is gone), until cancelled.

        on_listed: called whenever all that is there has been told.
        """

        def take(key: bytes, value: bytes | None) -> None:
            on_change(key[len(self._prefix) :].decode(errors="replace"), value)

        await watch_keys(self._etcd, self._kind, self._prefix, take, is_prefix=True, on_listed=on_listed)


def _after(prefix: bytes) -> bytes:
    """The first key that does not begin with `prefix`, which ends with a slash."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
