"""API keys in a TOML file, for one machine:

[[keys]]
tenant = "search"                # the name in metrics and fair shares; several keys may name the same tenant
sha256 = "9f86d0…"               # of the key, 64 hex digits; or in plain text: key = "sk-…"
models = ["small"]               # those that it may use; leave out for all
requests_per_minute = 600        # all four over all gateways; a tenant's keys in the file count together
requests_per_day = 100000
tokens_per_minute = 200000       # prompt and answer; leave any out for no limit
tokens_per_day = 50000000
max_concurrent = 64              # sequences at once, n of a request with n choices; leave out for no limit
priority = 0                     # class that its requests get; they may ask for a later one, never for a sooner
slo_ttft_ms = 2000               # what its requests have that say nothing themselves; without it the gateway's
slo_itl_ms = 50                  # the same for the time between tokens
cache_salt = "…"                 # tenants share cached prompts if theirs is the same; without it, with nobody
expires_at = 2027-01-31T00:00:00Z
admin = true                     # may see what is everybody's
"""

import hashlib
from pathlib import Path

import msgspec

from app.keys.tenant import KeyTerms, Tenant, UnusableTerm, check_terms, digest_of, tenant_of
from planes.wire.unreadable import UNREADABLE


class KeyFileError(ValueError):
    """The key file cannot be used; the message says where and why."""


class KeyEntry(KeyTerms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[keys]]` table."""

    key: str | None = None
    sha256: str | None = None


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    keys: list[KeyEntry]


def load_keys(path: Path) -> dict[bytes, Tenant]:
    """Tenants by sha256 of their key.  Raises:  KeyFileError."""
    try:
        entries = msgspec.toml.decode(path.read_bytes(), type=KeyFile).keys
    except OSError as exc:
        raise KeyFileError(f"The key file {path} cannot be read: {exc.strerror}") from exc
    except UNREADABLE as exc:
        raise KeyFileError(f"The key file {path} is not valid: {exc}") from exc
    tenants: dict[bytes, Tenant] = {}
    for index, entry in enumerate(entries):
        digest = _digest(entry, f"The key file {path} is not valid: keys[{index}] ({entry.tenant!r})")
        if digest in tenants:
            raise KeyFileError(f"The key file {path} is not valid: keys[{index}] ({entry.tenant!r}) has a key twice")
        tenants[digest] = tenant_of(entry, f"file/{entry.tenant}")
    return tenants


def _digest(entry: KeyEntry, where: str) -> bytes:
    if not entry.tenant:
        raise KeyFileError(f"{where} needs a tenant name")
    try:
        check_terms(entry)
    except UnusableTerm as exc:
        raise KeyFileError(f"{where} has {exc}") from exc
    match entry.key, entry.sha256:
        case (str(key), None) if key and key.isascii():
            return digest_of(key)
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
