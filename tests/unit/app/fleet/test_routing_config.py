import pytest

from app.fleet.routing_config import LiveConfig, LiveRouting, routing
from app.settings import GatewaySettings

STARTED = GatewaySettings(policy="dynamo", queue_limit=7, slo_ttft_s=2.0)


def follow(apply):
    return LiveRouting(STARTED, routing(STARTED, LiveConfig()), apply)


def test_without_the_key_everything_is_as_it_was_started():
    found = routing(STARTED, LiveConfig())
    assert (found.policy.name, found.shadow) == ("dynamo", None)
    assert (found.settings.queue_limit, found.settings.slo_ttft_s) == (7, 2.0)


def test_what_the_key_names_replaces_what_was_started():
    applied = []
    live = follow(applied.append)
    assert live.in_force.policy.name == "dynamo"
    live.take(b'{"policy": "random", "shadow_policy": "dynamo", "queue_limit": 9}')
    live.take(b'{"shadow_policy": ""}')
    live.take(None)
    first, second, third = applied
    assert (first.policy.name, first.shadow.name, first.settings.queue_limit) == ("random", "dynamo", 9)
    assert first.settings.slo_ttft_s == 2.0
    assert second.shadow is None
    assert (third.policy.name, third.settings.queue_limit) == ("dynamo", 7)
    assert live.in_force is third


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
        b"\xff",
    ],
)
def test_an_unusable_change_changes_nothing(content):
    applied = []
    live = follow(applied.append)
    before = live.in_force
    live.take(content)
    assert (applied, live.in_force) == ([], before)
    assert live.refused_because
    assert [gauge.value for gauge in live.gauges()] == [1]
    live.take(None)
    assert (live.in_force is applied[0], live.refused_because) == (True, "")
    assert [gauge.value for gauge in live.gauges()] == [0]
