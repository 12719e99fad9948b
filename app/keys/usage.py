"""What each key has used, by day of UTC and model: counted in memory, added to etcd every `_FLUSH_S`.

An entry a day and key, `usage/{day}/{account}`, to which each gateway adds. An addition has a number, and the entry
remembers the last one of each gateway: if nobody knows whether etcd has taken one, it is tried again and counts once.
A gateway that dies has lost what it had not added, the last seconds; one that stops has added everything.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

import msgspec
import structlog

from app.keys.tenant import Tenant
from app.metrics import Gauge, Total
from planes.control import ControlPlaneUnavailable
from planes.entries import NEW, Entries, Entry, OpenEntries
from planes.wire.unreadable import UNREADABLE

_log = structlog.get_logger()

KIND: Final = "usage"
"""Of the entries in etcd."""
KEPT_DAYS: Final = 400
_FLUSH_S: Final = 2.0
_LAST_WORDS_S: Final = 5.0
_MOST_TENANTS: Final = 100
"""That have series of their own in the metrics."""
_OTHERS: Final = "(others)"


class Counts(msgspec.Struct, array_like=True):
    """Of one model."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "Counts") -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


class UsageEntry(msgspec.Struct):
    """As etcd has it. told: the number of each gateway's last addition."""

    tenant: str
    models: dict[str, Counts] = {}
    told: dict[str, int] = {}

    def add(self, models: dict[str, Counts]) -> None:
        for model, counts in models.items():
            self.models.setdefault(model, Counts()).add(counts)


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Of one key on one day with one model."""

    day: str
    key: str
    tenant: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class _Page:
    """What this gateway has not added yet to one entry."""

    tenant: str
    fresh: dict[str, Counts]
    sent: dict[str, Counts]
    """On its way under `number`; what comes meanwhile is fresh."""
    number: int = 0


class UsageBook:
    """The usage that this gateway has seen.

    gateway: its name, which no other one has, nor this one after its next start.  wall_clock: seconds since 1970.
    """

    def __init__(self, entries: Entries, *, gateway: str, wall_clock: Callable[[], float]) -> None:
        self._entries = entries
        self._gateway = gateway
        self._wall_clock = wall_clock
        self._pages: dict[str, _Page] = {}
        """By the names of entries."""
        self._tenants: dict[str, Counts] = {}
        self._dropped_before = ""

    def add(self, tenant: Tenant, model: str, counts: Counts) -> None:
        """Nobody's usage is counted where there are no keys."""
        if not tenant.account:
            return
        name = f"{self._today()}/{tenant.account}"
        page = self._pages.get(name)
        if page is None:
            page = self._pages[name] = _Page(tenant.name, {}, {})
        page.fresh.setdefault(model, Counts()).add(counts)
        shown = tenant.name if tenant.name in self._tenants or len(self._tenants) < _MOST_TENANTS else _OTHERS
        self._tenants.setdefault(shown, Counts()).add(counts)

    def gauges(self) -> Iterator[Gauge]:
        for tenant, counts in self._tenants.items():
            label = (("tenant", tenant),)
            yield Total("tenant_requests", "Requests let in, by tenant: the first 100.", counts.requests, label)
            yield Total("tenant_prompt_tokens", "Prompt tokens computed, by tenant.", counts.prompt_tokens, label)
            yield Total("tenant_completion_tokens", "Tokens generated, by tenant.", counts.completion_tokens, label)

    async def run(self) -> None:
        """Add to etcd until cancelled."""
        await self._entries.keep(self._talk)

    async def stop(self) -> None:
        """Add what is left."""
        if not self._pages:
            return
        try:
            async with asyncio.timeout(_LAST_WORDS_S), self._entries.opened() as entries:
                await self.flush(entries)
        except (ControlPlaneUnavailable, TimeoutError) as exc:
            _log.warning("usage.lost", entries=len(self._pages), reason=str(exc))

    async def flush(self, entries: OpenEntries) -> None:
        """Add all that has been counted until now."""
        today = self._today()
        for name, page in list(self._pages.items()):
            if not page.sent:
                page.sent, page.fresh = page.fresh, {}
                page.number += 1
            await self._send(entries, name, page)
            page.sent = {}
            if not page.fresh and not name.startswith(today):
                del self._pages[name]
        oldest = (self._now() - timedelta(days=KEPT_DAYS)).date().isoformat()
        if oldest != self._dropped_before:
            await entries.drop(oldest)
            self._dropped_before = oldest

    async def lines(self, first: date, last: date, account: str | None) -> list[UsageLine]:
        """What is known of these days, both included.

        Args:  account: of one key; None: of all.  Raises:  ControlPlaneUnavailable.
        """
        found: dict[str, UsageEntry] = {}
        async with self._entries.opened() as entries:
            if account is None:
                listed = await entries.list(first.isoformat(), (last + timedelta(days=1)).isoformat())
            else:
                listed = {}
                for offset in range((last - first).days + 1):
                    name = f"{(first + timedelta(days=offset)).isoformat()}/{account}"
                    if (entry := await entries.find(name)) is not None:
                        listed[name] = entry
        for name, entry in listed.items():
            if (read := _decoded(name, entry)) is not None:
                found[name] = read
        for name, page in self._pages.items():
            day, _, whose = name.partition("/")
            if first.isoformat() <= day <= last.isoformat() and account in (None, whose):
                entry_ = found.setdefault(name, UsageEntry(page.tenant))
                entry_.add(page.fresh)
                if entry_.told.get(self._gateway, 0) != page.number:
                    entry_.add(page.sent)
        return [line for name in sorted(found) for line in _lines(name, found[name])]

    async def _talk(self, entries: OpenEntries, healthy: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            await self.flush(entries)
            healthy()

    async def _send(self, entries: OpenEntries, name: str, page: _Page) -> None:
        while page.sent:
            found = await entries.find(name)
            entry = None if found is None else _decoded(name, found)
            entry = entry or UsageEntry(page.tenant)
            if entry.told.get(self._gateway) == page.number:
                return  # it had arrived though nobody said so
            entry.add(page.sent)
            entry.told[self._gateway] = page.number
            revision = NEW if found is None else found.revision
            if await entries.swap(name, msgspec.json.encode(entry), revision=revision):
                return

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._wall_clock(), UTC)

    def _today(self) -> str:
        return self._now().date().isoformat()


def _lines(name: str, entry: UsageEntry) -> Iterator[UsageLine]:
    day, _, account = name.partition("/")
    for model, counts in sorted(entry.models.items()):
        yield UsageLine(
            day, account, entry.tenant, model, counts.requests, counts.prompt_tokens, counts.completion_tokens
        )


def _decoded(name: str, entry: Entry) -> UsageEntry | None:
    """None for what nobody can read: it is begun anew."""
    try:
        return msgspec.json.decode(entry.value, type=UsageEntry)
    except UNREADABLE as exc:
        _log.error("usage.malformed", entry=name, reason=str(exc))
        return None
