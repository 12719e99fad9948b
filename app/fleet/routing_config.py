"""Routing settings that may change while the gateway runs: `/headrace/{namespace}/config` in etcd, as JSON.

    {"policy": "dynamo", "queue_limit": 1000}

    {"slo_itl_s": 0.05, "models": {"org/small": {"slo_ttft_s": 0.5}}}

What it names replaces what the gateway was started with; the rest stays; without the key everything is as it was
started. An unusable value changes nothing, whatever is wrong with it; the log, `GET /v1/fleet` and a metric say so.

Who can write to etcd must not run code here: the key takes the names of our own policies. A class of somebody's own is
imported because this very gateway was started with it, and for no other reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import structlog

from app.metrics import Gauge
from app.settings import GatewaySettings
from planes.wire.unreadable import UNREADABLE
from router.policies import POLICIES, load_policy
from router.policy import Policy
from router.settings import ModelSlos, RouterSettings

_log = structlog.get_logger()

RANGES: Final = {
    "queue_limit": (1, 10**9),
    "slo_ttft_s": (1e-3, 1e9),
    "slo_itl_s": (1e-6, 1e6),
    "late_s": (0.0, 1e9),
    "aging": (1e-6, 1e6),
    "promote_after_s": (1e-3, 1e9),
    "quantum_tokens": (1, 10**9),
    "report_delay_s": (0.0, 60.0),
    "history": (1, 10**6),
}
"""What etcd holds may be anything: within these the router's arithmetic is safe, and its memory bounded."""
_MAX_MODELS: Final = 1024


class RoutingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields of the key; None: as the gateway was started. Meaning as in `router/settings.py`."""

    policy: str | None = None
    shadow_policy: str | None = None
    queue_limit: int | None = None
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    models: dict[str, ModelSlos] | None = None
    refuse_late: bool | None = None
    late_s: float | None = None
    aging: float | None = None
    promote_after_s: float | None = None
    quantum_tokens: int | None = None
    report_delay_s: float | None = None
    history: int | None = None


@dataclass(frozen=True, slots=True)
class RoutingSetup:
    """What `Router.configure` takes."""

    settings: RouterSettings
    policy: Policy
    shadow: Policy | None


def routing_setup(started: GatewaySettings, config: RoutingConfig) -> RoutingSetup:
    """Raises:  ValueError naming what cannot be used."""
    own = {name for name in (started.policy, started.shadow_policy) if name}
    for field in ("policy", "shadow_policy"):
        name = getattr(config, field)
        if name and name not in POLICIES and name not in own:
            raise ValueError(
                f"{field} is {name!r} and must be one of {', '.join(sorted(POLICIES))}; a class of your own is loaded "
                f"only where a gateway is started with --{field.replace('_', '-')}"
            )
    changed = {name: value for name in (*RANGES, "refuse_late") if (value := getattr(config, name)) is not None}
    for name in changed.keys() & RANGES.keys():
        _check_range(name, name, changed[name])
    if config.models is not None:
        _check_models(config.models)
        changed["models"] = config.models
    shadow = started.shadow_policy if config.shadow_policy is None else config.shadow_policy
    return RoutingSetup(
        settings=replace(
            RouterSettings(
                queue_limit=started.queue_limit,
                slo_ttft_s=started.slo_ttft_s,
                slo_itl_s=None if started.slo_itl_ms is None else started.slo_itl_ms / 1000,
                refuse_late=started.refuse_late,
            ),
            **changed,
        ),
        policy=load_policy(started.policy if config.policy is None else config.policy),
        shadow=load_policy(shadow) if shadow else None,
    )


def _check_models(models: dict[str, ModelSlos]) -> None:
    if len(models) > _MAX_MODELS:
        raise ValueError(f"there are SLOs of {len(models)} models and must be of {_MAX_MODELS} at most")
    for model, slos in models.items():
        for name in slos.__struct_fields__:
            if (value := getattr(slos, name)) is not None:
                _check_range(f"models.{model}.{name}", name, value)


def _check_range(called: str, name: str, value: float) -> None:
    least, most = RANGES[name]
    if not least <= value <= most:
        raise ValueError(f"{called} is {value} and must be {least:g} to {most:g}")


class RoutingConfigFollower:
    """Takes each new content of the key and lets `apply` have it, if it is any good."""

    def __init__(self, started: GatewaySettings, in_force: RoutingSetup, apply: Callable[[RoutingSetup], None]) -> None:
        """`in_force`: what the router was built with."""
        self._started = started
        self._apply = apply
        self.in_force = in_force
        self.refused_because = ""
        """Why the latest content is not in force; empty: it is."""

    def take(self, content: bytes | None) -> None:
        """None: the key was deleted. Never raises: what stands in etcd is no reason for a gateway to end."""
        try:
            config = RoutingConfig() if content is None else msgspec.json.decode(content, type=RoutingConfig)
            changed = routing_setup(self._started, config)
            self._apply(changed)
        except (ValueError, *UNREADABLE) as exc:
            self._refused(str(exc))
        except Exception as exc:  # noqa: BLE001 - a policy of somebody's own may raise anything
            self._refused(f"{type(exc).__name__}: {exc}")
        else:
            self.in_force, self.refused_because = changed, ""
            _log.info("config.applied", **msgspec.to_builtins(config))

    def _refused(self, reason: str) -> None:
        self.refused_because = reason
        _log.warning("config.refused", reason=reason)

    def gauges(self) -> Iterator[Gauge]:
        """For the metrics."""
        yield Gauge("config_refused", "1 if what `headrace config` set was refused here.", bool(self.refused_because))
