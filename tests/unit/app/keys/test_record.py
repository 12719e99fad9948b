from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from app.keys.record import created, decoded, new_id, new_secret, rotated, tenants_of
from app.keys.tenant import KeyTerms, UnusableTerm, digest_of
from tests.fakes import DEEP

NOW = datetime(2026, 11, 28, tzinfo=UTC)
HOUR = timedelta(hours=1)


def made(secret="sk-1", **terms):
    return created(KeyTerms(**({"tenant": "t"} | terms)), secret, now=NOW)


def expiries(record):
    return {digest: tenant.expires_at for digest, tenant in tenants_of("key_1", record).items()}


def test_secrets_and_ids_are_not_guessable_and_never_the_same():
    assert len({new_secret() for _ in range(100)}) == len({new_id() for _ in range(100)}) == 100
    assert len(new_secret()) >= 6 + 43, "256 bits"


def test_a_record_holds_no_secret_and_reads_as_it_was_written():
    record = made("sk-hr-secret", models=["m"], tokens_per_minute=5)
    encoded = msgspec.json.encode(record)
    assert b"sk-hr-secret" not in encoded
    assert decoded(encoded) == record
    assert expiries(record) == {digest_of("sk-hr-secret"): None}


@pytest.mark.parametrize("value", [b"", b"[]", b"\xff", DEEP], ids=["empty", "no object", "no UTF-8", "deep"])
def test_what_is_no_record_is_refused_in_one_way(value):
    with pytest.raises(ValueError, match=r"."):
        decoded(value)


def test_a_rotated_key_keeps_its_terms_and_lets_both_secrets_in_for_a_while():
    record = rotated(made("sk-1", priority=4), "sk-2", grace=HOUR, now=NOW)
    assert expiries(record) == {digest_of("sk-1"): (NOW + HOUR).timestamp(), digest_of("sk-2"): None}
    assert {(each.account, each.priority) for each in tenants_of("key_1", record).values()} == {("key_1", 4)}
    later = rotated(record, "sk-3", grace=10 * HOUR, now=NOW + HOUR / 2)
    assert expiries(later)[digest_of("sk-1")] == (NOW + HOUR).timestamp(), "no secret's end is put off"
    last = rotated(later, "sk-4", grace=HOUR, now=NOW + 2 * HOUR)
    assert set(expiries(last)) == {digest_of(f"sk-{n}") for n in (2, 3, 4)}, "what has ended is forgotten"


def test_without_grace_the_secret_before_ends_at_once():
    assert set(expiries(rotated(made("sk-1"), "sk-2", grace=timedelta(0), now=NOW))) == {digest_of("sk-2")}


def test_a_secret_does_not_outlive_its_key():
    record = rotated(made("sk-1", expires_at=NOW + HOUR), "sk-2", grace=2 * HOUR, now=NOW)
    assert set(expiries(record).values()) == {(NOW + HOUR).timestamp()}


def test_an_older_gateway_reads_what_a_newer_one_has_added():
    encoded = msgspec.json.encode(msgspec.to_builtins(made()) | {"new": 1})
    assert decoded(encoded) == made()


@pytest.mark.parametrize("terms", [{"max_concurrent": 0}, {"requests_per_day": -1}, {"tokens_per_minute": 10**16}])
def test_terms_that_mean_nothing_make_no_key(terms):
    with pytest.raises(UnusableTerm):
        made(**terms)


@pytest.mark.parametrize("value", [b"", b"{}", b"\xff", b'{"tenant": "t", "secrets": [{"sha256": "x"}]}'])
def test_what_is_no_key_is_told_so(value):
    with pytest.raises((ValueError, msgspec.DecodeError)):
        decoded(value)
