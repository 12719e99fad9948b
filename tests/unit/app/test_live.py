import pytest

from app.live import LiveConfig, LiveRouting, routing
from app.settings import GatewaySettings

STARTED = GatewaySettings(policy="dynamo", queue_limit=7, slo_ttft_s=2.0)


def test_without_the_key_everything_is_as_it_was_started():
    found = routing(STARTED, LiveConfig())
    assert (found.policy.name, found.shadow) == ("dynamo", None)
    assert (found.settings.queue_limit, found.settings.slo_ttft_s) == (7, 2.0)


def test_what_the_key_names_replaces_what_was_started():
    applied = []
    live = LiveRouting(STARTED, applied.append)
    live.take(b'{"policy": "random", "shadow_policy": "dynamo", "queue_limit": 9}')
    live.take(b'{"shadow_policy": ""}')
    live.take(None)
    first, second, third = applied
    assert (first.policy.name, first.shadow.name, first.settings.queue_limit) == ("random", "dynamo", 9)
    assert first.settings.slo_ttft_s == 2.0
    assert second.shadow is None
    assert (third.policy.name, third.settings.queue_limit) == ("dynamo", 7)


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
    LiveRouting(STARTED, applied.append).take(content)
    assert applied == []
