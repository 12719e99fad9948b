"""Routing settings that may change while the gateway runs: `/headrace/{namespace}/config` in etcd, as JSON.

    {"policy": "dynamo", "queue_limit": 1000}

What it names replaces what the gateway was started with; the rest stays; without the key everything is as it was
started. An unusable value changes nothing; the log, `GET /v1/fleet` and a metric say so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import msgspec
import structlog

from app.metrics import Gauge
from app.settings import GatewaySettings
from router.policies import load_policy
from router.policy import Policy
from router.settings import RouterSettings

_log = structlog.get_logger()


class LiveConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields of the key; None: as the gateway was started. Ranges and meaning as in `router/settings.py`."""

    policy: str | None = None
    shadow_policy: str | None = None
    queue_limit: int | None = None
    slo_ttft_s: float | None = None
    aging: float | None = None
    promote_after_s: float | None = None
    quantum_tokens: int | None = None
    report_delay_s: float | None = None
    history: int | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """What `Router.configure` takes."""

    settings: RouterSettings
    policy: Policy
    shadow: Policy | None


def routing(started: GatewaySettings, live: LiveConfig) -> Routing:
    """Raises:  ValueError naming what cannot be used."""
    settings = RouterSettings(queue_limit=started.queue_limit, slo_ttft_s=started.slo_ttft_s)
    named = msgspec.to_builtins(live)
    changed = {name: value for name, value in named.items() if name not in ("policy", "shadow_policy")}
    shadow = started.shadow_policy if live.shadow_policy is None else live.shadow_policy
    return Routing(
        settings=replace(settings, **changed),
        policy=load_policy(started.policy if live.policy is None else live.policy),
        shadow=load_policy(shadow) if shadow else None,
    )


class LiveRouting:
    """Takes each new content of the key and lets `apply` have it, if it is any good."""

    def __init__(self, started: GatewaySettings, in_force: Routing, apply: Callable[[Routing], None]) -> None:
        """`in_force`: what the router was built with."""
        self._started = started
        self._apply = apply
        self.in_force = in_force
        self.refused_because = ""
        """Why the latest content is not in force; empty: it is."""

    def take(self, content: bytes | None) -> None:
        """None: the key was deleted."""
        try:
            live = LiveConfig() if content is None else msgspec.json.decode(content, type=LiveConfig)
            changed = routing(self._started, live)
            self._apply(changed)
        except (ValueError, UnicodeDecodeError) as exc:  # msgspec's errors are ValueErrors
            self.refused_because = str(exc)
            _log.warning("config.refused", reason=self.refused_because)
        else:
            self.in_force, self.refused_because = changed, ""
            _log.info("config.applied", **msgspec.to_builtins(live))

    def gauges(self) -> Iterator[Gauge]:
        """For the metrics."""
        yield Gauge("config_refused", "1 if what `headrace config` set was refused here.", bool(self.refused_because))
