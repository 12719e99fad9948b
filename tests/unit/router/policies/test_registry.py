import pytest

from router.policies import POLICIES, load_policy


@pytest.mark.parametrize("name", POLICIES)
def test_every_registered_policy_loads_under_its_name(name):
    assert load_policy(name).name == name


def test_a_users_own_class_loads():
    assert load_policy("router.policies.headrace:Headrace").name == "headrace"


@pytest.mark.parametrize(
    "name", ["best", "no.such.module:Class", "router.policies.headrace:Missing", "random:Random", ":"]
)
def test_what_cannot_be_loaded_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        load_policy(name)


def test_whatever_a_plug_in_raises_is_told_as_what_is_wrong_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "surprising.py").write_text("raise ZeroDivisionError('at import')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"surprising:Policy.* cannot be loaded: ZeroDivisionError: at import"):
        load_policy("surprising:Policy")
