import pytest

from app.auth import ApiKeys
from app.keys.file import KeyFileError, load_keys
from app.keys.tenant import Limits


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
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\ntokens_per_day = 0", "tokens_per_day 0; it must be at least 1"),
        ("[[keys]]\ntenant = 'a'\nkey = 'x'\nexpires_at = 2027-01-31T00:00:00", "it must name its zone"),
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


def test_all_terms_are_read(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(
        "[[keys]]\ntenant = 'a'\nkey = 'x'\nmodels = ['m']\nrequests_per_minute = 1\nrequests_per_day = 2\n"
        "tokens_per_minute = 3\ntokens_per_day = 4\nadmin = true\nexpires_at = 1970-01-01T00:01:00Z\n"
    )
    (tenant,) = load_keys(path).values()
    assert (tenant.account, tenant.models, tenant.is_admin) == ("file/a", {"m"}, True)
    assert (tenant.limits, tenant.expires_at) == (Limits(1, 2, 3, 4), 60.0)
