"""`headrace keys`: API keys in etcd (`app/keys/record.py`), which gateways with `--api-keys` follow at once."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec
from cyclopts import Parameter

from app.keys.record import KIND, KeyRecord, created, decoded, new_id, new_secret, rotated
from app.keys.tenant import KeyTerms, UnusableTerm, check_terms
from planes.control import Etcd
from planes.entries import NEW, Entries
from planes.wire.errors import HeadraceError, UnusableSetting
from process.logging import printable
from process.settings import EtcdSettings


class UnknownKey(HeadraceError):  # noqa: N818 - names what is wrong
    """There is no such key, or it cannot be read."""

    code = "unknown_key"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySettings(EtcdSettings):
    """What a new key allows."""

    models: Annotated[
        list[str] | None, Parameter(help="A model that it may use; may be given several times. Default: all.")
    ] = None
    requests_per_minute: Annotated[int | None, Parameter(help="Most requests in a minute. Default: no limit.")] = None
    requests_per_day: Annotated[int | None, Parameter(help="Most requests in a day of UTC. Default: no limit.")] = None
    tokens_per_minute: Annotated[
        int | None, Parameter(help="Most tokens in a minute, of prompts and answers. Default: no limit.")
    ] = None
    tokens_per_day: Annotated[int | None, Parameter(help="The same in a day of UTC. Default: no limit.")] = None
    max_concurrent: Annotated[int | None, Parameter(help="Most sequences at once. Default: no limit.")] = None
    priority: Annotated[
        int, Parameter(help="Class of its requests; lower is sooner. They may ask for a later one.")
    ] = 0
    slo_ttft_ms: Annotated[
        float | None,
        Parameter(help="By when a first token shall come if the request does not say. Default: gateway's."),
    ] = None
    slo_itl_ms: Annotated[float | None, Parameter(help="The same for the mean time between tokens.")] = None
    cache_salt: Annotated[
        str | None, Parameter(help="Keys of the same salt share cached prompts. Default: the tenant's own.")
    ] = None
    expires_in_days: Annotated[float | None, Parameter(help="When it ends. Default: never.")] = None
    admin: Annotated[bool, Parameter(help="It may see what is everybody's, such as all usage.", negative="")] = False

    def terms(self, tenant: str, *, now: datetime) -> KeyTerms:
        """Raises:  UnusableSetting."""
        days = self.expires_in_days
        if days is not None and not 0 < days <= 36_500:
            raise UnusableSetting("expires_in_days", days, "it must be more than 0, and 36500 at most")
        if not tenant or len(tenant) > 128 or not tenant.isprintable():
            raise UnusableSetting("tenant", tenant, "it must be 1 to 128 printable characters")
        names = [each.name for each in fields(KeySettings) if each.name in KeyTerms.__struct_fields__]
        expires_at = None if days is None else now + timedelta(days=days)
        terms = KeyTerms(tenant=tenant, expires_at=expires_at, **{name: getattr(self, name) for name in names})
        try:
            check_terms(terms)
        except UnusableTerm as exc:
            raise UnusableSetting(exc.name, exc.value, exc.allowed) from exc
        return terms


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateSettings(EtcdSettings):
    """How a key's secret is replaced."""

    grace_s: Annotated[float, Parameter(help="So long the secret before goes on to work, in seconds.")] = 3600.0

    def __post_init__(self) -> None:
        EtcdSettings.__post_init__(self)
        if not 0 <= self.grace_s <= 1e9:
            raise UnusableSetting("grace_s", self.grace_s, "it must be 0 to 1000000000 seconds")


async def create_key(tenant: str, settings: KeySettings, *, now: datetime) -> tuple[str, str]:
    """Returns:  the new key's id, and its secret.  Raises:  UnusableSetting; ControlPlaneUnavailable."""
    name, secret = new_id(), new_secret()
    record = created(settings.terms(tenant, now=now), secret, now=now)
    async with _entries(settings).opened() as entries:
        if not await entries.swap(name, msgspec.json.encode(record), revision=NEW):
            raise UnknownKey(f"there is a key {name} already; create it again")
    return name, secret


async def revoke_key(name: str, settings: EtcdSettings) -> None:
    """Raises:  UnknownKey; ControlPlaneUnavailable."""
    async with _entries(settings).opened() as entries:
        while True:
            found = await entries.find(name)
            if found is None:
                raise UnknownKey(f"there is no key {name[:64]!r}; headrace keys list names those that there are")
            if await entries.swap(name, None, revision=found.revision):
                return


async def rotate_key(name: str, settings: RotateSettings, *, now: datetime) -> str:
    """Returns:  the new secret.  Raises:  UnknownKey; ControlPlaneUnavailable."""
    secret, grace = new_secret(), timedelta(seconds=settings.grace_s)
    await _change(name, settings, lambda record: rotated(record, secret, grace=grace, now=now))
    return secret


async def _change(name: str, settings: EtcdSettings, change: Callable[[KeyRecord], KeyRecord]) -> None:
    async with _entries(settings).opened() as entries:
        while True:
            found = await entries.find(name)
            if found is None:
                raise UnknownKey(f"there is no key {name[:64]!r}; headrace keys list names those that there are")
            try:
                record = decoded(found.value)
            except ValueError as exc:
                raise UnknownKey(f"what etcd holds for {name[:64]!r} is no key ({exc}); revoke it") from exc
            if await entries.swap(name, msgspec.json.encode(change(record)), revision=found.revision):
                return


async def list_keys(settings: EtcdSettings, *, now: datetime) -> str:
    """A table.  Raises:  ControlPlaneUnavailable."""
    async with _entries(settings).opened() as entries:
        found = await entries.list()
    return table({name: entry.value for name, entry in found.items()}, now=now)


def table(found: dict[str, bytes], *, now: datetime) -> str:
    """The keys for a terminal, no secret among them: whatever is in etcd, anybody may have written it."""
    rows = [("KEY", "TENANT", "CREATED", "EXPIRES", "SECRETS", "ALLOWS")]
    for name, value in found.items():
        try:
            record = decoded(value)
        except ValueError as exc:
            rows.append((name, "unreadable", "", "", "", str(exc)))
            continue
        living = [each for each in record.secrets if each.expires_at is None or each.expires_at > now]
        rows.append(
            (name, record.tenant, _day(record.created_at), _expiry(record, now), str(len(living)), _allowed(record))
        )
    widths = [max(len(printable(row[at])) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(f"{printable(cell):{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _allowed(record: KeyRecord) -> str:
    shown = [f"{name}={getattr(record, name)}" for name in _SHOWN if getattr(record, name) not in (None, 0, False)]
    models = [] if record.models is None else [f"models={','.join(record.models) or 'none'}"]
    return " ".join([*models, *shown]) or "everything"


def _expiry(record: KeyRecord, now: datetime) -> str:
    if record.expires_at is None:
        return "never"
    return "expired" if record.expires_at <= now else _day(record.expires_at)


def _day(instant: datetime) -> str:
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _entries(settings: EtcdSettings) -> Entries:
    return Entries(Etcd(settings.etcd, security=settings.etcd_security), settings.namespace, KIND)


_SHOWN = (
    "requests_per_minute",
    "requests_per_day",
    "tokens_per_minute",
    "tokens_per_day",
    "max_concurrent",
    "priority",
    "slo_ttft_ms",
    "slo_itl_ms",
    "admin",
)
