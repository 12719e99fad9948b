from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from structlog.testing import capture_logs

from app.keys.record import created, rotated
from app.keys.stored import StoredKeys
from app.keys.tenant import KeyTerms, digest_of
from tests.fakes import DEEP

NOW = datetime(2026, 11, 28, tzinfo=UTC)


def record(secret, tenant="t"):
    return created(KeyTerms(tenant=tenant), secret, now=NOW)


def test_a_changed_key_is_known_by_its_new_secrets_alone():
    stored, first = StoredKeys(), record("sk-1")
    stored.take("key_1", msgspec.json.encode(first))
    stored.take("key_2", msgspec.json.encode(record("sk-9", "other")))
    stored.take("key_1", msgspec.json.encode(rotated(first, "sk-2", grace=timedelta(0), now=NOW)))
    assert {digest: tenant.name for digest, tenant in stored.tenants.items()} == {
        digest_of("sk-2"): "t",
        digest_of("sk-9"): "other",
    }
    stored.take("key_1", None)
    assert (len(stored), list(stored.tenants)) == (1, [digest_of("sk-9")])


@pytest.mark.parametrize("value", [b"{", DEEP], ids=["broken", "deep"])
def test_a_key_that_becomes_unreadable_lets_nobody_in(value):
    stored = StoredKeys()
    stored.take("key_1", msgspec.json.encode(record("sk-1")))
    with capture_logs() as logs:
        stored.take("key_1", value)
    assert not stored.tenants
    assert [(line["event"], line["key"]) for line in logs] == [("key.malformed", "key_1")]
