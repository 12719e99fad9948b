import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from app.auth import (
    AdminOnly,
    ApiKeys,
    KeysUnknown,
    TooManyChoices,
    TooManyConcurrent,
    Unauthenticated,
    is_open_to_others,
)
from app.keys.file import KeyFileError
from app.keys.record import created, new_secret
from app.keys.stored import StoredKeys
from app.keys.tenant import ANYBODY, KeyTerms

DIGEST = hashlib.sha256(b"sk-two").hexdigest()
KEYS = f"""
[[keys]]
tenant = "one"
key = "sk-one"
priority = 2
max_concurrent = 2
cache_salt = "s"

[[keys]]
tenant = "two"
sha256 = "{DIGEST}"
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    return path


def test_without_a_key_file_anybody_may_ask():
    keys = ApiKeys()
    assert keys.is_open
    assert keys.authenticate({}) is ANYBODY


def test_a_key_in_plain_text_or_hashed_names_its_tenant(path):
    keys = ApiKeys(path)
    one = keys.authenticate({"authorization": "Bearer sk-one"})
    assert (one.name, one.priority, one.max_concurrent, one.cache_salt) == ("one", 2, 2, "s")
    assert keys.authenticate({"authorization": "bearer  sk-two "}).name == "two"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer "},
        {"authorization": "Basic sk-one"},
        {"authorization": "sk-one"},
        {"authorization": "Bearer sk-three"},
        {"authorization": f"Bearer {DIGEST}"},
        {"authorization": "Bearer \xff"},
    ],
)
def test_anything_but_a_known_key_is_unauthenticated(path, headers):
    with pytest.raises(Unauthenticated):
        ApiKeys(path).authenticate(headers)


def test_the_key_never_appears_in_the_error(path):
    with pytest.raises(Unauthenticated) as caught:
        ApiKeys(path).authenticate({"authorization": "Bearer sk-secret"})
    assert "sk-secret" not in str(caught.value)


def test_requests_beyond_the_tenants_limit_are_rejected_until_one_ends(path):
    keys = ApiKeys(path)
    tenant = keys.authenticate({"authorization": "Bearer sk-one"})
    with keys.admitted(tenant):
        with keys.admitted(tenant), pytest.raises(TooManyConcurrent, match="limit is 2"), keys.admitted(tenant):
            pass
        with keys.admitted(tenant):
            assert keys.num_running(tenant) == 2
    assert keys.num_running(tenant) == 0


def test_each_choice_of_a_request_counts(path):
    keys = ApiKeys(path)
    tenant = keys.authenticate({"authorization": "Bearer sk-one"})
    with keys.admitted(tenant) as one:
        one.widen(2)
        assert keys.num_running(tenant) == 2
        with pytest.raises(TooManyConcurrent, match="2 sequences of 'one' are under way"), keys.admitted(tenant):
            pass
    with keys.admitted(tenant) as one, keys.admitted(tenant) as other:
        one.widen(1)
        with pytest.raises(TooManyConcurrent, match="1 sequences of 'one' are under way, this request is for 2"):
            other.widen(2)
        assert keys.num_running(tenant) == 2
    assert keys.num_running(tenant) == 0


def test_a_request_for_more_choices_than_the_limit_is_told_so_rather_than_to_come_again(path):
    keys = ApiKeys(path)
    tenant = keys.authenticate({"authorization": "Bearer sk-one"})
    with keys.admitted(tenant) as one:
        with pytest.raises(TooManyChoices, match="'n' is 3 and the key of 'one' allows 2") as caught:
            one.widen(3)
        assert caught.value.param == "n"
    assert keys.num_running(tenant) == 0
    with keys.admitted(ANYBODY) as anybody:
        anybody.widen(16)


def test_a_request_that_fails_is_no_longer_counted(path):
    keys = ApiKeys(path)
    tenant = keys.authenticate({"authorization": "Bearer sk-one"})
    with pytest.raises(RuntimeError), keys.admitted(tenant):
        raise RuntimeError
    assert keys.num_running(tenant) == 0


def test_reloading_takes_new_keys_and_keeps_the_count(path):
    keys = ApiKeys(path)
    tenant = keys.authenticate({"authorization": "Bearer sk-one"})
    with keys.admitted(tenant):
        path.write_text('[[keys]]\ntenant = "one"\nkey = "sk-new"\nmax_concurrent = 1\n')
        keys.reload()
        with pytest.raises(Unauthenticated):
            keys.authenticate({"authorization": "Bearer sk-one"})
        renewed = keys.authenticate({"authorization": "Bearer sk-new"})
        with pytest.raises(TooManyConcurrent), keys.admitted(renewed):
            pass
    assert keys.num_running(tenant) == 0


def test_an_unusable_file_leaves_the_old_keys_valid(path):
    keys = ApiKeys(path)
    path.write_text("[[keys]]\n")
    with pytest.raises(KeyFileError):
        keys.reload()
    assert keys.authenticate({"authorization": "Bearer sk-one"}).name == "one"


@pytest.mark.parametrize(
    ("host", "keys", "is_open"),
    [("0.0.0.0", None, True), ("::", None, True), ("10.0.0.1", None, True), ("0.0.0.0", Path("k"), False)]
    + [(host, None, False) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")]
    + [("127.0.0.1.example.org", None, True)],
)
def test_who_listens_beyond_this_machine_without_keys_is_open_to_others(host, keys, is_open):
    assert is_open_to_others(host, keys) is is_open


NOW = datetime(2026, 11, 28, tzinfo=UTC)


def bearer(secret):
    return {"authorization": f"Bearer {secret}"}


def stored_key(stored, name="key_1", **terms):
    secret = new_secret()
    record = created(KeyTerms(**({"tenant": "t"} | terms)), secret, now=NOW)
    stored.take(name, msgspec.json.encode(record))
    return secret


def test_a_gateway_that_has_not_heard_from_etcd_knows_no_key_and_says_so(path):
    stored = StoredKeys()
    keys = ApiKeys(path, stored=stored)
    assert not keys.is_open
    assert keys.authenticate(bearer("sk-one")).name == "one", "the file's are known"
    with pytest.raises(KeysUnknown):
        keys.authenticate(bearer("sk-hr-x"))
    stored.listed()
    with pytest.raises(Unauthenticated, match="not one of this server's"):
        keys.authenticate(bearer("sk-hr-x"))


def test_a_key_in_etcd_works_from_when_it_is_heard_of_until_it_is_gone():
    stored = StoredKeys()
    keys = ApiKeys(stored=stored)
    stored.listed()
    secret = stored_key(stored, tenant="search", priority=3)
    tenant = keys.authenticate({"x-api-key": secret})
    assert (tenant.name, tenant.account, tenant.priority) == ("search", "key_1", 3)
    stored.take("key_1", None)
    with pytest.raises(Unauthenticated):
        keys.authenticate(bearer(secret))


def test_an_expired_key_lets_nobody_in():
    stored, now = StoredKeys(), [NOW.timestamp()]
    keys = ApiKeys(stored=stored, wall_clock=lambda: now[0])
    secret = stored_key(stored, expires_at=NOW + timedelta(seconds=10))
    now[0] += 9.9
    keys.authenticate(bearer(secret))
    now[0] += 0.1
    with pytest.raises(Unauthenticated, match="expired"):
        keys.authenticate(bearer(secret))


def test_what_is_everybodys_is_told_to_admins_and_where_there_are_no_keys():
    stored = StoredKeys()
    keys = ApiKeys(stored=stored)
    plain, admin = stored_key(stored), stored_key(stored, "key_2", admin=True)
    assert keys.authenticate_admin(bearer(admin)).account == "key_2"
    with pytest.raises(AdminOnly):
        keys.authenticate_admin(bearer(plain))
    with pytest.raises(Unauthenticated):
        keys.authenticate_admin({})
    assert ApiKeys().authenticate_admin({}) is ANYBODY


def test_each_key_in_etcd_counts_its_own_sequences():
    stored = StoredKeys()
    keys = ApiKeys(stored=stored)
    one, other = (stored_key(stored, name, max_concurrent=1) for name in ("key_1", "key_2"))
    with (
        keys.admitted(keys.authenticate(bearer(one))),
        keys.admitted(keys.authenticate(bearer(other))),
        pytest.raises(TooManyConcurrent),
        keys.admitted(keys.authenticate(bearer(one))),
    ):
        pass
