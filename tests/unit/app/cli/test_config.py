import json

import pytest

from app.cli.config import NAMES, ConfigSettings, UnusableConfig, changed, live_settings, shown
from planes.wire.errors import UnusableSetting


def test_changes_join_what_is_there():
    first = changed(None, ("policy=dynamo", "slo_ttft_s=2.5"))
    assert json.loads(first) == {"policy": "dynamo", "slo_ttft_s": 2.5}
    second = changed(first, ("queue_limit=7", "policy=random", "shadow_policy="))
    assert json.loads(second) == {"policy": "random", "slo_ttft_s": 2.5, "queue_limit": 7, "shadow_policy": ""}


def test_null_goes_back_to_what_was_started():
    assert json.loads(changed(b'{"policy": "dynamo", "queue_limit": 7}', ("policy=null",))) == {"queue_limit": 7}


def test_a_model_has_slos_of_its_own_whatever_its_name():
    first = changed(
        None, ("models.org/m-1.5.slo_ttft_s=2", "models.a=b.slo_itl_s=0.02", "models.org/m-1.5.slo_itl_s=1")
    )
    assert json.loads(first) == {
        "models": {"org/m-1.5": {"slo_ttft_s": 2.0, "slo_itl_s": 1.0}, "a=b": {"slo_itl_s": 0.02}}
    }
    second = changed(first, ("models.a=b.slo_itl_s=null", "models.org/m-1.5.slo_itl_s=null", "models.c.slo_itl_s=null"))
    assert json.loads(second) == {"models": {"org/m-1.5": {"slo_ttft_s": 2.0}}}
    assert json.loads(changed(second, ("models.org/m-1.5.slo_ttft_s=null",))) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("policy", "'policy' must look like name=value"),
        ("polcy=random", "'polcy' is no live setting; there are policy, shadow_policy"),
        ("policy=none_such", "policy is 'none_such' and must be"),
        ("policy=os:abort", "policy is 'os:abort' .* only where a gateway is started with --policy"),
        ("shadow_policy=os:abort", "shadow_policy is 'os:abort' .* started with --shadow-policy"),
        ("queue_limit=x", "queue_limit is 'x' and must be a whole number, or null, which takes it away"),
        ("quantum_tokens=1.5", "quantum_tokens is '1.5' and must be a whole number"),
        ("aging=1e999", "aging is '1e999' and must be a smaller number"),
        ("aging=", "aging is '' and must be a number"),
        ("refuse_late=often", "refuse_late is 'often' and must be true or false"),
        ("queue_limit=0", "queue_limit is 0 and must be 1 to"),
        ("slo_ttft_s=-1", "slo_ttft_s is -1.0"),
        ("slo_ttft_s=nan", "slo_ttft_s is nan"),
        ("models.a.b.slo_ttft_s=nan", r"models\.a\.b\.slo_ttft_s is nan and must be 0.001 to"),
        ("models.a.b.slo_itl_s=x", r"models\.a\.b\.slo_itl_s is 'x' and must be a number"),
        ("models.a.aging=1", r"'models\.a\.aging' is no live setting; there are .* models\.MODEL\.slo_itl_s"),
        ("models.slo_itl_s=1", r"'models\.slo_itl_s' is no live setting"),
        ("models={}", "'models' is no live setting"),
    ],
)
def test_what_gateways_would_refuse_is_refused_at_once(change, message):
    with pytest.raises(UnusableConfig, match=message):
        changed(b'{"policy": "dynamo"}', ("history=5", change))


def test_every_setting_is_explained_by_whoever_declares_it():
    told = {each.name: each for each in live_settings()}
    assert tuple(told) == NAMES
    assert (told["aging"].otherwise, told["history"].meaning) == (
        "4.0",
        "Most decisions kept for explain, 1 or more. Here 1 to 1e+06.",
    )
    assert (told["shadow_policy"].otherwise, told["queue_limit"].otherwise) == ("--shadow-policy", "--queue-limit")
    assert told["policy"].meaning.startswith("Routing policy: a name")


def test_a_broken_value_is_said_and_how_to_remove_it():
    with pytest.raises(UnusableConfig, match="headrace config --clear"):
        changed(b'{"polcy": 1}', ("policy=dynamo",))


def test_what_etcd_holds_is_shown_and_gives_no_orders_to_a_terminal():
    assert shown(b'{"policy": "dynamo"}') == '{"policy": "dynamo"}'
    assert shown(b"\x1b[2J\xff") == "\\x1b[2J\ufffd"
    assert shown(None) == "{}"


def test_a_setting_that_cannot_work_is_named():
    with pytest.raises(UnusableSetting, match="--namespace is 'a/b'"):
        ConfigSettings(namespace="a/b")
