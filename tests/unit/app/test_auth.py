import hashlib
from pathlib import Path

import pytest

from app.auth import (
    ANYBODY,
    ApiKeys,
    KeyFileError,
    Tenant,
    TooManyChoices,
    TooManyConcurrent,
    Unauthenticated,
    is_open_to_others,
    load_keys,
)

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
    assert keys.authenticate({"authorization": "Bearer sk-one"}) == Tenant("one", 2, 2, "s")
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
    ("text", "said"),
    [
        ("keys = 3", "Expected `array`"),
        ("nonsense", "not valid"),
        ("[[keys]]\nkey = 'x'", "missing required field `tenant`"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\nprioriti = 1", "unknown field `prioriti`"),
        ("[[keys]]\ntenant = ''\nkey = 'x'", "needs a tenant name"),
        ("[[keys]]\ntenant = 'a'", "either 'key' (ASCII text) or 'sha256'"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\nsha256 = 'y'", "either 'key'"),
        ("[[keys]]\ntenant = 'a'\nkey = ''", "either 'key'"),
        ("[[keys]]\ntenant = 'a'\nsha256 = 'abc'", "not 64 hex digits"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\nmax_concurrent = 0", "max_concurrent 0; it must be at least 1"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\npriority = 9999", "from -1000 to 1000"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\nslo_ttft_ms = 0", "slo_ttft_ms 0.0; it must be from 0.001 to 86400000"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\nslo_itl_ms = nan", "slo_itl_ms nan; it must be from 0.001 to"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\nslo_itl_ms = '5'", "Expected `float | null`, got `str`"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\n[[keys]]\ntenant = 'b'\nkey = 'x'", "has a key twice"),
    ],
)
def test_an_unusable_file_is_refused_with_the_reason(tmp_path, text, said):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        load_keys(path)
    assert said in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(KeyFileError, match="cannot be read"):
        ApiKeys(tmp_path / "none.toml")


def test_a_key_says_what_its_requests_shall_keep(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text("[[keys]]\ntenant = 'a'\nkey = 'x'\nslo_ttft_ms = 2000\nslo_itl_ms = 12.5\n")
    (tenant,) = load_keys(path).values()
    assert (tenant.slo_ttft_s, tenant.slo_itl_s) == (2.0, 0.0125)


def test_nobody_gets_ahead_of_their_key():
    tenant = Tenant("a", priority=2)
    assert [tenant.priority_of(requested) for requested in (None, 0, 2, 5)] == [2, 2, 2, 5]


def test_no_tenant_can_spell_the_salt_of_another():
    salted, plain = Tenant("a", cache_salt="x"), Tenant("b")
    assert plain.salted("") == ""
    assert salted.salted("y") == "1:xy"
    assert plain.salted("1:xy") != salted.salted("y")
    assert Tenant("c", cache_salt="xy").salted("") != salted.salted("y")


def test_tenants_share_cached_prompts_only_if_their_keys_say_so(tmp_path):
    path = tmp_path / "keys.toml"

    def salts(*salts):
        entries = [f'[[keys]]\ntenant = "{i}"\nkey = "sk-{i}"\n{salt}\n' for i, salt in enumerate(salts)]
        path.write_text("".join(entries))
        return {tenant.salted("") for tenant in load_keys(path).values()}

    assert len(salts("", "")) == 2
    assert "" not in salts("", "")
    assert len(salts('cache_salt = "x"', 'cache_salt = "x"')) == 1
    assert salts('cache_salt = ""', 'cache_salt = ""') == {""}


@pytest.mark.parametrize(
    ("host", "keys", "is_open"),
    [("0.0.0.0", None, True), ("::", None, True), ("10.0.0.1", None, True), ("0.0.0.0", Path("k"), False)]
    + [(host, None, False) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")]
    + [("127.0.0.1.example.org", None, True)],
)
def test_who_listens_beyond_this_machine_without_keys_is_open_to_others(host, keys, is_open):
    assert is_open_to_others(host, keys) is is_open
