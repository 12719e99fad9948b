"""What any process of a gateway answers for all of them: each function asks the siblings, where there are some."""

import os
from typing import Any, Literal

import msgspec

from app.gateway import Gateway
from app.keys.tenant import Tenant
from app.processes.adding import added_up, decoded, encoded, exposition, families, kept
from app.processes.siblings import Ask, AskHealth, AskMetrics, AskRoute, AskRoutes
from planes.wire.messages import RequestId
from router.request import Explanation
from router.timeline import Timeline

Told = dict[str, Any]
_ORDER = ("ok", "no worker", "leaving")


class Health(msgspec.Struct, frozen=True):
    """One process's, or the worst of several. num_processes: that answered."""

    status: Literal["ok", "no worker", "leaving"]
    workers: int
    num_processes: int = 1


async def metrics(gateway: Gateway) -> bytes:
    """The text that Prometheus scrapes."""
    siblings = gateway.siblings
    if siblings is None:
        return gateway.metrics.exposition()
    place = siblings.place
    parts = [(place.number, siblings.counters.told(families(gateway.metrics.registry)))]
    for number, data in (await siblings.ask(AskMetrics())).items():
        parts.append((number, kept(place.counters(number)) if data is None else decoded(data)))
    return exposition(added_up(parts))


async def health(gateway: Gateway) -> Health:
    """A client may come to any process: the port is as well as the worst one that is there."""
    own = _own_health(gateway)
    if gateway.siblings is None:
        return own
    answers = (await gateway.siblings.ask(AskHealth())).values()
    all_there = [own, *(msgspec.json.decode(data, type=Health) for data in answers if data is not None)]
    return Health(
        max((each.status for each in all_there), key=_ORDER.index),
        min(each.workers for each in all_there),
        len(all_there),
    )


async def explained(gateway: Gateway, request: str, tenant: Tenant) -> Told | None:
    """Why a request went where it went, whichever process served it; None: not known, or not for this tenant."""
    name = None if tenant.is_admin else tenant.name
    own = _own_explained(gateway, request, name)
    if own is not None or gateway.siblings is None:
        return own
    answers = [data for data in (await gateway.siblings.ask(AskRoute(request, name))).values() if data is not None]
    return next((found for data in answers if (found := msgspec.json.decode(data)) is not None), None)


async def recent(gateway: Gateway, tenant: Tenant, limit: int) -> list[Told]:
    """The last timelines, the latest first."""
    name = None if tenant.is_admin else tenant.name
    told = _own_recent(gateway, name, limit)
    if gateway.siblings is None:
        return told
    for data in (await gateway.siblings.ask(AskRoutes(name, limit))).values():
        told += [] if data is None else msgspec.json.decode(data, type=list[Told])
    return sorted(told, key=lambda each: each["received_at"] + each["end_s"], reverse=True)[:limit]


def process(gateway: Gateway) -> Told | None:
    """Which process answers, where there are several."""
    if gateway.siblings is None:
        return None
    place = gateway.siblings.place
    return {"number": place.number, "of": place.num_processes, "pid": os.getpid()}


def answer(gateway: Gateway, ask: Ask) -> bytes:
    """To a sibling, for this process alone."""
    match ask:
        case AskMetrics():
            own = families(gateway.metrics.registry)
            return encoded(own if gateway.siblings is None else gateway.siblings.counters.told(own))
        case AskHealth():
            return msgspec.json.encode(_own_health(gateway))
        case AskRoute(request, tenant):
            return msgspec.json.encode(_own_explained(gateway, request, tenant))
        case AskRoutes(tenant, limit):
            return msgspec.json.encode(_own_recent(gateway, tenant, limit))


def explanation_told(explanation: Explanation, now: float, wall_now: float) -> Told:
    """As JSON; `age_s` in place of an instant on a clock that only this process has."""
    told: Told = msgspec.to_builtins(explanation)
    for attempt in (told, *told["earlier"]):
        attempt["age_s"] = now - attempt.pop("submitted_at")
    if explanation.timeline is not None:
        told["timeline"] = _timeline_told(explanation.timeline, now, wall_now)
    return told


def _timeline_told(timeline: Timeline, now: float, wall_now: float) -> Told:
    """As JSON; `received_at` in seconds since 1970."""
    told: Told = msgspec.to_builtins(timeline)
    told["received_at"] = wall_now - (now - timeline.received_at)
    return told


def _own_health(gateway: Gateway) -> Health:
    status: Literal["ok", "no worker", "leaving"] = "ok" if gateway.fleet.is_serving else "no worker"
    return Health("leaving" if gateway.departure.is_under_way else status, gateway.fleet.num_connected)


def _own_explained(gateway: Gateway, request: str, tenant: str | None) -> Told | None:
    explanation = gateway.router.explain(RequestId(request))
    if explanation is None or tenant not in (None, explanation.tenant):
        return None
    return explanation_told(explanation, gateway.clock(), gateway.wall_clock())


def _own_recent(gateway: Gateway, tenant: str | None, limit: int) -> list[Told]:
    now, wall_now = gateway.clock(), gateway.wall_clock()
    found = gateway.router.recent(tenant, limit)
    return [_timeline_told(each.timeline, now, wall_now) for each in found if each.timeline is not None]
