"""Whoever holds a key, and what the key allows: as written in etcd or a file, and as requests see it."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import msgspec

from app.openai.sampling import LEAST_MS, MOST_MS

_MOST: Final = 10**15
"""Of anything that is counted: sums of several stay exact in JSON, for readers with doubles too."""
_COUNTS: Final = (
    "max_concurrent",
    "requests_per_minute",
    "requests_per_day",
    "tokens_per_minute",
    "tokens_per_day",
)


class UnusableTerm(ValueError):  # noqa: N818 - names what is wrong
    """One of a key's terms cannot be kept."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} {value}; {allowed}")
        self.name, self.value, self.allowed = name, value, allowed


class KeyTerms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a key allows. Of what is None there is no limit."""

    tenant: str
    models: list[str] | None = None
    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrent: int | None = None
    priority: int = 0
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None
    cache_salt: str | None = None
    """None: the tenant's own."""
    expires_at: datetime | None = None
    admin: bool = False


def check_terms(terms: KeyTerms) -> None:
    """Raises:  UnusableTerm."""
    for name in _COUNTS:
        value = getattr(terms, name)
        if value is not None and not 1 <= value <= _MOST:
            allowed = "it must be at least 1" if value < 1 else f"it must be at most {_MOST}"
            raise UnusableTerm(name, value, allowed)
    if not -1000 <= terms.priority <= 1000:
        raise UnusableTerm("priority", terms.priority, "it must be from -1000 to 1000")
    for name in ("slo_ttft_ms", "slo_itl_ms"):
        value = getattr(terms, name)
        if value is not None and not LEAST_MS <= value <= MOST_MS:
            raise UnusableTerm(name, value, f"it must be from {LEAST_MS:g} to {MOST_MS:.0f}")
    if terms.expires_at is not None and terms.expires_at.tzinfo is None:
        raise UnusableTerm("expires_at", terms.expires_at, "it must name its zone, as in 2027-01-31T00:00:00Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one account. None: no limit."""

    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever holds a key."""

    name: str = ""
    priority: int = 0
    max_concurrent: int | None = None
    cache_salt: str = ""
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    """Both of requests that say nothing themselves."""
    account: str = ""
    """Under which limits and usage are counted: a key's id, or `file/TENANT` for all of a tenant's keys in a file."""
    models: frozenset[str] | None = None
    """Those that it may use; None: all."""
    limits: Limits = Limits()
    is_admin: bool = False
    expires_at: float | None = None
    """Seconds since 1970; None: never."""

    def priority_of(self, requested: int | None) -> int:
        """The class of a request: lower is sooner, and nobody gets ahead of their key."""
        return self.priority if requested is None else max(self.priority, requested)

    def salted(self, requested: str) -> str:
        """The cache salt of a request. The length in front keeps one tenant from spelling another one's salt."""
        if not self.cache_salt and not requested:
            return ""
        return f"{len(self.cache_salt)}:{self.cache_salt}{requested}"

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


ANYBODY: Final = Tenant(is_admin=True)
"""Who asks where no keys are configured."""


def tenant_of(terms: KeyTerms, account: str) -> Tenant:
    """Whether a prompt is cached tells that somebody has sent it: so by default every tenant has a salt of its own."""
    return Tenant(
        terms.tenant,
        terms.priority,
        terms.max_concurrent,
        f"tenant {terms.tenant}" if terms.cache_salt is None else terms.cache_salt,
        slo_ttft_s=None if terms.slo_ttft_ms is None else terms.slo_ttft_ms / 1000,
        slo_itl_s=None if terms.slo_itl_ms is None else terms.slo_itl_ms / 1000,
        account=account,
        models=None if terms.models is None else frozenset(terms.models),
        limits=Limits(terms.requests_per_minute, terms.requests_per_day, terms.tokens_per_minute, terms.tokens_per_day),
        is_admin=terms.admin,
        expires_at=None if terms.expires_at is None else terms.expires_at.timestamp(),
    )


def digest_of(secret: str) -> bytes:
    """What is kept of a key.

    sha-256 and no slow hash (bcrypt, argon2): those make guessing dear where people choose the secret. Ours have 256
    random bits, which nobody guesses at any speed, and each request would pay for the slowness.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
