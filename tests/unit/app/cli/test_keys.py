import re
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from app.cli.keys import KeySettings, RotateSettings, table
from app.keys.record import created, rotated
from app.keys.tenant import KeyTerms, digest_of
from planes.wire.errors import UnusableSetting

NOW = datetime(2026, 11, 28, tzinfo=UTC)


def test_what_the_flags_say_are_the_terms():
    settings = KeySettings(models=["a", "b"], tokens_per_minute=7, admin=True, expires_in_days=1.5)
    assert settings.terms("t", now=NOW) == KeyTerms(
        tenant="t", models=["a", "b"], tokens_per_minute=7, admin=True, expires_at=NOW + timedelta(hours=36)
    )


@pytest.mark.parametrize(
    ("tenant", "changed", "words"),
    [
        ("", {}, "--tenant is ''"),
        ("a\nb", {}, "--tenant is"),
        ("t", {"requests_per_minute": 0}, "--requests-per-minute is 0: it must be at least 1"),
        ("t", {"expires_in_days": 0.0}, "--expires-in-days is 0.0"),
        ("t", {"slo_itl_ms": -1.0}, "--slo-itl-ms is -1.0"),
    ],
)
def test_terms_that_mean_nothing_are_refused_by_name(tenant, changed, words):
    with pytest.raises(UnusableSetting, match=re.escape(words)):
        KeySettings(**changed).terms(tenant, now=NOW)


def test_a_grace_period_is_not_negative():
    with pytest.raises(UnusableSetting, match="--grace-s is -1"):
        RotateSettings(grace_s=-1.0)


def test_the_list_names_keys_and_what_they_allow_and_no_secret():
    one = created(KeyTerms(tenant="search", tokens_per_day=9, models=["m"]), "sk-hr-1", now=NOW)
    old = created(KeyTerms(tenant="old", expires_at=NOW - timedelta(days=1)), "sk-hr-2", now=NOW - timedelta(days=2))
    found = {
        "key_1": msgspec.json.encode(rotated(one, "sk-hr-3", grace=timedelta(hours=1), now=NOW)),
        "key_2": msgspec.json.encode(old),
        "key_3": b"\x1b[31m",
    }
    lines = [line.split() for line in table(found, now=NOW).splitlines()]
    assert lines[1] == ["key_1", "search", "2026-11-28", "00:00", "never", "2", "models=m", "tokens_per_day=9"]
    assert lines[2] == ["key_2", "old", "2026-11-26", "00:00", "expired", "1", "everything"]
    assert lines[3][:2] == ["key_3", "unreadable"]
    shown = table(found, now=NOW)
    assert not any(text in shown for text in ("sk-hr", digest_of("sk-hr-1").hex(), "\x1b"))
