"""An API key as etcd has it: `/headrace/{namespace}/keys/{id}`, its terms and the digests of its secrets, never those.

A key has an id, which is no secret: it names the key in lists, limits and usage, and stays when the secret is rotated.
The secret before goes on for a while then, so there may be several.
"""

import secrets
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

import msgspec

from app.keys.tenant import KeyTerms, Tenant, check_terms, digest_of, tenant_of
from planes.wire.unreadable import UNREADABLE

KIND: Final = "keys"
"""Of the entries in etcd."""
_SECRET_BYTES: Final = 32


class Secret(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept of one."""

    sha256: str
    created_at: datetime
    expires_at: datetime | None = None


class KeyRecord(KeyTerms, frozen=True, kw_only=True, omit_defaults=True):
    """One key."""

    secrets: list[Secret]
    created_at: datetime


def new_id() -> str:
    return f"key_{secrets.token_hex(6)}"


def new_secret() -> str:
    """Shown once, to whoever asked for it."""
    return f"sk-hr-{secrets.token_urlsafe(_SECRET_BYTES)}"


def created(terms: KeyTerms, secret: str, *, now: datetime) -> KeyRecord:
    """Raises:  UnusableTerm."""
    check_terms(terms)
    fields = {name: getattr(terms, name) for name in KeyTerms.__struct_fields__}
    return KeyRecord(**fields, secrets=[Secret(_hex(secret), now)], created_at=now)


def rotated(record: KeyRecord, secret: str, *, grace: timedelta, now: datetime) -> KeyRecord:
    """With another secret; those before end after `grace`, if they do not sooner."""
    end = now + grace
    before = [
        msgspec.structs.replace(each, expires_at=end if each.expires_at is None else min(end, each.expires_at))
        for each in record.secrets
    ]
    left = [each for each in before if each.expires_at is not None and each.expires_at > now]
    return msgspec.structs.replace(record, secrets=[*left, Secret(_hex(secret), now)])


def decoded(value: bytes) -> KeyRecord:
    """Raises:  ValueError for what cannot be used."""
    try:
        record = msgspec.json.decode(value, type=KeyRecord)
    except UNREADABLE as exc:
        raise ValueError(str(exc)) from exc
    check_terms(record)
    for each in record.secrets:
        if len(bytes.fromhex(each.sha256)) != 32:
            raise ValueError("a sha256 that is not 64 hex digits")
    return record


def tenants_of(name: str, record: KeyRecord) -> dict[bytes, Tenant]:
    """By the digest of each secret: the tenant, until the secret or the key ends."""
    tenant = tenant_of(record, name)
    return {bytes.fromhex(each.sha256): _ending(tenant, each) for each in record.secrets}


def _ending(tenant: Tenant, secret: Secret) -> Tenant:
    if secret.expires_at is None:
        return tenant
    ends = [secret.expires_at.timestamp(), *([] if tenant.expires_at is None else [tenant.expires_at])]
    return replace(tenant, expires_at=min(ends))


def _hex(secret: str) -> str:
    return digest_of(secret).hex()
