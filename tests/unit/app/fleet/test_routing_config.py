import sys
from types import ModuleType

import pytest

from app.fleet.routing_config import RoutingConfig, RoutingConfigFollower, routing_setup
from app.settings import GatewaySettings
from router.settings import ModelSlos

STARTED = GatewaySettings(policy="dynamo", queue_limit=7, slo_ttft_s=2.0)


def follow(apply, started=STARTED):
    return RoutingConfigFollower(started, routing_setup(STARTED, RoutingConfig()), apply)


@pytest.fixture
def own():
    """A module of somebody's own, with a policy whose construction does what the test sets."""
    module = ModuleType("own_policies")

    class Own:
        name = "own"
        built = 0

        def __init__(self):
            Own.built += 1

        def choose(self, request, view): ...

    class Broken(Own):
        def __init__(self):
            raise RuntimeError("no licence")

    class Nameless(Own):
        name = 7

    vars(module).update(Own=Own, Broken=Broken, Nameless=Nameless)
    sys.modules["own_policies"] = module
    yield module
    del sys.modules["own_policies"]


def test_without_the_key_everything_is_as_it_was_started():
    found = routing_setup(STARTED, RoutingConfig())
    assert (found.policy.name, found.shadow) == ("dynamo", None)
    assert (found.settings.queue_limit, found.settings.slo_ttft_s) == (7, 2.0)


def test_what_the_key_names_replaces_what_was_started():
    applied = []
    follower = follow(applied.append)
    assert follower.in_force.policy.name == "dynamo"
    follower.take(b'{"policy": "random", "shadow_policy": "dynamo", "queue_limit": 9}')
    follower.take(b'{"shadow_policy": ""}')
    follower.take(None)
    first, second, third = applied
    assert (first.policy.name, first.shadow.name, first.settings.queue_limit) == ("random", "dynamo", 9)
    assert first.settings.slo_ttft_s == 2.0
    assert second.shadow is None
    assert (third.policy.name, third.settings.queue_limit) == ("dynamo", 7)
    assert follower.in_force is third


def test_models_may_have_slos_of_their_own():
    applied = []
    follower = follow(applied.append)
    follower.take(b'{"slo_itl_s": 0.05, "models": {"org/m-1.5": {"slo_ttft_s": 0.5}}}')
    settings = applied[0].settings
    assert (settings.slos_of("org/m-1.5").slo_ttft_s, settings.slos_of("org/m-1.5").slo_itl_s) == (0.5, None)
    assert (settings.slos_of("other"), settings.slo_ttft_s, settings.slo_itl_s) == (ModelSlos(), 2.0, 0.05)
    follower.take(b'{"models": {"org/m-1.5": {"slo_ttft_s": 1e-9}}}')
    assert follower.refused_because == "models.org/m-1.5.slo_ttft_s is 1e-09 and must be 0.001 to 1e+09"
    assert follower.in_force.settings is settings
    follower.take(None)
    assert follower.in_force.settings.models == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"polcy": "random"}',
        b'{"policy": "none such"}',
        b'{"queue_limit": 0}',
        b'{"aging": "x"}',
        b'{"aging": 1e300}',
        b'{"promote_after_s": 1e-300}',
        b'{"quantum_tokens": 1' + b"0" * 400 + b"}",
        b'{"history": 99999999999}',
        b'{"models": {"m": {"aging": 1}}}',
        b'{"models": {"m": {"slo_itl_s": 0}}}',
        b'{"models": {%s}}' % b",".join(b'"m%d": {}' % number for number in range(1025)),
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_an_unusable_change_changes_nothing(content):
    applied = []
    follower = follow(applied.append)
    before = follower.in_force
    follower.take(content)
    assert (applied, follower.in_force) == ([], before)
    assert follower.refused_because
    assert [gauge.value for gauge in follower.gauges()] == [1]
    follower.take(None)
    assert (follower.in_force is applied[0], follower.refused_because) == (True, "")
    assert [gauge.value for gauge in follower.gauges()] == [0]


def test_a_class_that_no_flag_named_is_neither_imported_nor_built(own):
    applied = []
    follower = follow(applied.append)
    for field in ("policy", "shadow_policy"):
        follower.take(b'{"%s": "own_policies:Own"}' % field.encode())
        assert f"{field} is 'own_policies:Own' and must be one of aibrix, dynamo" in follower.refused_because
    assert (applied, own.Own.built) == ([], 0)


def test_the_class_that_the_gateway_was_started_with_may_be_named(own):
    applied = []
    started = GatewaySettings(policy="own_policies:Own")
    follower = follow(applied.append, started)
    follower.take(b'{"policy": "dynamo", "shadow_policy": "own_policies:Own"}')
    follower.take(b'{"policy": "own_policies:Own"}')
    assert [setup.policy.name for setup in applied] == ["dynamo", "own"]
    assert applied[0].shadow.name == "own"


@pytest.mark.parametrize("name", ["own_policies:Broken", "own_policies:Nameless"])
def test_a_policy_that_raises_anything_is_refused_and_nothing_changes(own, name):
    applied = []
    follower = follow(applied.append, GatewaySettings(policy=name))
    before = follower.in_force
    follower.take(b'{"queue_limit": 9}')
    assert (applied, follower.in_force) == ([], before)
    assert f"policy '{name}' cannot be loaded" in follower.refused_because
    follower.take(b'{"policy": "random"}')
    assert (applied[0].policy.name, follower.refused_because) == ("random", "")


def test_a_router_that_takes_no_change_is_no_reason_to_end():
    def fails(setup):
        raise KeyError("x")

    follower = follow(fails)
    before = follower.in_force
    follower.take(b'{"policy": "random"}')
    assert (follower.in_force, follower.refused_because) == (before, "KeyError: 'x'")
