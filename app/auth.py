"""API keys: who is asking, and how much of it at once. No key file means that everybody may ask.

The file is TOML:

    [[keys]]
    tenant = "search"                # the name in metrics and fair shares; several keys may name the same tenant
    sha256 = "9f86d0…"               # of the key, 64 hex digits; or in plain text: key = "sk-…"
    priority = 0                     # class that its requests get; they may ask for a later one, never for a sooner
    max_concurrent = 64              # sequences at once, n of a request with n choices; leave out for no limit
    slo_ttft_ms = 2000               # what its requests have that say nothing themselves; without it the gateway's
    slo_itl_ms = 50                  # the same for the time between tokens
    cache_salt = "…"                 # tenants share cached prompts if theirs is the same; without it, with nobody
"""

import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from app.openai.sampling import LEAST_MS, MOST_MS
from planes.wire.errors import InvalidRequest, Rejected


class Unauthenticated(InvalidRequest):
    """No key, or one that is not ours."""

    code = "invalid_api_key"


class TooManyConcurrent(Rejected):
    """The tenant has so many sequences under way that its key does not allow this request's too."""

    code = "concurrency_limit"

    def __init__(self, tenant: str, running: int, n: int, limit: int) -> None:
        super().__init__(
            f"{running} sequences of '{tenant}' are under way, this request is for {n}, and the limit is {limit}; "
            "send it when some have ended.",
            retry_after_s=1.0,
        )


class TooManyChoices(InvalidRequest):
    """A request for more sequences than the tenant's key ever allows at once."""

    code = "too_many_choices"

    def __init__(self, tenant: str, n: int, limit: int) -> None:
        super().__init__(
            f"'n' is {n} and the key of '{tenant}' allows {limit} sequences at once; ask for fewer choices.", param="n"
        )


class KeyFileError(ValueError):
    """The key file cannot be used; the message says where and why."""


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

    def priority_of(self, requested: int | None) -> int:
        """The class of a request: lower is sooner, and nobody gets ahead of their key."""
        return self.priority if requested is None else max(self.priority, requested)

    def salted(self, requested: str) -> str:
        """The cache salt of a request. The length in front keeps one tenant from spelling another one's salt."""
        if not self.cache_salt and not requested:
            return ""
        return f"{len(self.cache_salt)}:{self.cache_salt}{requested}"


ANYBODY = Tenant()
"""Who asks where no keys are configured."""


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[keys]]` table."""

    tenant: str
    key: str | None = None
    sha256: str | None = None
    priority: int = 0
    max_concurrent: int | None = None
    cache_salt: str | None = None
    slo_ttft_ms: float | None = None
    slo_itl_ms: float | None = None


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    keys: list[KeyEntry]


class ApiKeys:
    """The keys of one gateway, and the sequences that each tenant has under way."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises:  KeyFileError."""
        self._path = path
        self._tenants = {} if path is None else load_keys(path)
        self._running: dict[str, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether requests need no key."""
        return self._path is None

    def reload(self) -> None:
        """Read the file again; requests under way stay counted.  Raises:  KeyFileError: the old keys stay valid."""
        if self._path is not None:
            self._tenants = load_keys(self._path)

    def authenticate(self, headers: Mapping[str, str]) -> Tenant:
        """Who sent these headers (lower-case names).  Raises:  Unauthenticated."""
        if self._path is None:
            return ANYBODY
        key = _key_in(headers)
        if not key:
            raise Unauthenticated(
                "No API key was given; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'."
            )
        # Looked up by digest: how long that takes tells nothing about a key, as its sender cannot choose the digest.
        tenant = self._tenants.get(_digest(key))
        if tenant is None:
            raise Unauthenticated("The API key is not one of this server's.")
        return tenant

    def admitted(self, tenant: Tenant) -> "TenantSlots":
        """Count a request as under way for as long as a `with` block runs."""
        return TenantSlots(tenant, self._running)

    def num_running(self, tenant: Tenant) -> int:
        return self._running.get(tenant.name, 0)


class TenantSlots:
    """The sequences of one request under way. `running`: those of each tenant, by name; changed here."""

    __slots__ = ("_num", "_running", "_tenant")

    def __init__(self, tenant: Tenant, running: dict[str, int]) -> None:
        self._tenant = tenant
        self._running = running
        self._num = 0

    def __enter__(self) -> Self:
        """One sequence, as long as no more is known.  Raises:  TooManyConcurrent."""
        self.widen(1)
        return self

    def widen(self, n: int) -> None:
        """The request is for `n` sequences.  Raises:  TooManyConcurrent, TooManyChoices."""
        name, limit = self._tenant.name, self._tenant.max_concurrent
        others = self._running.get(name, 0) - self._num
        if limit is not None and n > limit:
            raise TooManyChoices(name, n, limit)
        if limit is not None and others + n > limit:
            raise TooManyConcurrent(name, others, n, limit)
        self._running[name] = others + n
        self._num = n

    def __exit__(self, *_: object) -> None:
        left = self._running[self._tenant.name] - self._num
        if left:
            self._running[self._tenant.name] = left
        else:
            del self._running[self._tenant.name]


def _key_in(headers: Mapping[str, str]) -> str:
    """OpenAI's clients send a bearer token, Anthropic's a header of its own; "" where there is neither."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip()


def is_open_to_others(host: str, key_file: Path | None) -> bool:
    """Whether a gateway that listens on `host` serves whoever reaches this machine, no key needed."""
    if key_file is not None or host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # a name may be anything


def load_keys(path: Path) -> dict[bytes, Tenant]:
    """Tenants by sha256 of their key.  Raises:  KeyFileError."""
    try:
        entries = msgspec.toml.decode(path.read_bytes(), type=KeyFile).keys
    except OSError as exc:
        raise KeyFileError(f"The key file {path} cannot be read: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise KeyFileError(f"The key file {path} is not valid: {exc}") from exc
    tenants: dict[bytes, Tenant] = {}
    for index, entry in enumerate(entries):
        digest = _digest_of(entry, f"The key file {path} is not valid: keys[{index}] ({entry.tenant!r})")
        if digest in tenants:
            raise KeyFileError(f"The key file {path} is not valid: keys[{index}] ({entry.tenant!r}) has a key twice")
        tenants[digest] = _tenant(entry)
    return tenants


def _tenant(entry: KeyEntry) -> Tenant:
    """Whether a prompt is cached tells that somebody has sent it: so by default every tenant has a salt of its own."""
    salt = f"tenant {entry.tenant}" if entry.cache_salt is None else entry.cache_salt
    return Tenant(
        entry.tenant,
        entry.priority,
        entry.max_concurrent,
        salt,
        slo_ttft_s=None if entry.slo_ttft_ms is None else entry.slo_ttft_ms / 1000,
        slo_itl_s=None if entry.slo_itl_ms is None else entry.slo_itl_ms / 1000,
    )


def _digest_of(entry: KeyEntry, where: str) -> bytes:
    if not entry.tenant:
        raise KeyFileError(f"{where} needs a tenant name")
    if entry.max_concurrent is not None and entry.max_concurrent < 1:
        raise KeyFileError(f"{where} has max_concurrent {entry.max_concurrent}; it must be at least 1")
    if not -1000 <= entry.priority <= 1000:
        raise KeyFileError(f"{where} has priority {entry.priority}; it must be from -1000 to 1000")
    for name, value in (("slo_ttft_ms", entry.slo_ttft_ms), ("slo_itl_ms", entry.slo_itl_ms)):
        if value is not None and not LEAST_MS <= value <= MOST_MS:
            raise KeyFileError(f"{where} has {name} {value}; it must be from {LEAST_MS:g} to {MOST_MS:.0f}")
    match entry.key, entry.sha256:
        case (str(key), None) if key and key.isascii():
            return _digest(key)
        case (None, str(digest)):
            try:
                packed = bytes.fromhex(digest)
            except ValueError:
                packed = b""
            if len(packed) != hashlib.sha256().digest_size:
                raise KeyFileError(f"{where} has a sha256 that is not 64 hex digits")
            return packed
        case _:
            raise KeyFileError(f"{where} needs either 'key' (ASCII text) or 'sha256'")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
