"""What `headrace doctor` makes of what it has seen: pure judgements, each with what to do."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from app.fleet.split import splits_of
from planes.wire.messages import LoadReport, Registration, WorkerId

_LEAST_FILES: Final = 4096
_MOST_SKEW_S: Final = 2.0
_DATE_AGE_S: Final = 2.0
_UNFIT_ETCD: Final = ("3.5.0", "3.5.1", "3.5.2")
_METRIC: Final = re.compile(r"^headrace_inexact_workers (\S+)$", re.MULTILINE)


class Level(StrEnum):
    """How bad it is. Only what is wrong fails the command."""

    OK = "ok"
    ODD = "odd"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """advice: what to do; empty: nothing."""

    level: Level
    what: str
    told: str
    advice: str = ""


def file_limit(soft: int) -> Finding:
    """Every client and every worker is an open file."""
    if soft < _LEAST_FILES:
        return Finding(
            Level.ODD, "open files", f"limit {soft}", f"ulimit -n {16 * _LEAST_FILES} before a gateway starts"
        )
    return Finding(Level.OK, "open files", f"limit {soft}")


def nixl(wheel: str | None, rdma_ports: Mapping[str, str], ucx_tls: str | None) -> Iterator[Finding]:
    """rdma_ports: state of each by name, as the kernel tells it.  ucx_tls: what UCX_TLS says."""
    if wheel is None:
        yield Finding(Level.ODD, "NIXL", "not installed here", "no KV cache is handed over by workers of this machine")
        return
    yield Finding(Level.OK, "NIXL", wheel)
    active = sorted(name for name, state in rdma_ports.items() if "ACTIVE" in state)
    if not rdma_ports:
        told, advice = "no RDMA device: handovers use shared memory or TCP", ""
        yield Finding(Level.OK, "RDMA", told, advice)
    elif not active:
        told = f"no port is active: {', '.join(sorted(rdma_ports))}"
        yield Finding(Level.WRONG, "RDMA", told, "bring a link up (ibstat, rdma link); until then handovers use TCP")
    elif ucx_tls is not None and not _allows_rdma(ucx_tls):
        told = f"{', '.join(active)} active, but UCX_TLS={ucx_tls} leaves RDMA out"
        yield Finding(Level.WRONG, "RDMA", told, "unset UCX_TLS, or add rc to it")
    else:
        yield Finding(Level.OK, "RDMA", f"{', '.join(active)} active, and UCX may use it")


def _allows_rdma(ucx_tls: str) -> bool:
    names = ucx_tls.removeprefix("^").split(",")
    has = any(name.startswith(("rc", "dc", "ud", "ib", "all")) for name in names)
    return not has if ucx_tls.startswith("^") else has


def etcd_version(version: str | None) -> Finding:
    """None: it could not be asked."""
    if version is None:
        return Finding(Level.ODD, "etcd version", "not told", "its /version could not be read; the rest may be well")
    if version in _UNFIT_ETCD:
        advice = "production needs another: etcd calls 3.5.0 to 3.5.2 unfit for it"
        return Finding(Level.ODD, "etcd version", version, advice)
    return Finding(Level.OK, "etcd version", version)


def fleet(
    workers: Iterable[Registration],
    reports: Mapping[WorkerId, LoadReport],
    greeted: frozenset[WorkerId],
    snapshots: Mapping[WorkerId, str],
    *,
    wall_now: float,
) -> Iterator[Finding]:
    """greeted: who answered at its address.  snapshots: by worker, why its blocks cannot be had; empty: they can."""
    found = sorted(workers, key=lambda each: each.worker)
    if not found:
        yield Finding(
            Level.WRONG, "workers", "none is registered", "headrace worker --role both; or another --namespace"
        )
        return
    for each in found:
        yield _worker(each, reports.get(each.worker), each.worker in greeted, snapshots.get(each.worker, ""))
        ahead_s = each.epoch / 1e9 - wall_now
        if ahead_s > _MOST_SKEW_S:
            told = f"{each.worker} started {ahead_s:.0f} s from now"
            yield Finding(Level.WRONG, "clocks", told, "synchronise the clocks of these machines (chrony, NTP)")
    for model in sorted({each.model for each in found}):
        own = [each for each in found if each.model == model]
        if not any(each.role.can_decode for each in own):
            yield Finding(Level.WRONG, "roles", f"nobody decodes {model}", "start a worker with --role decode or both")
    for reason in splits_of(found).values():
        yield Finding(Level.WRONG, "compatibility", reason, "make these workers alike")


def _worker(each: Registration, report: LoadReport | None, is_greeted: bool, no_snapshot: str) -> Finding:
    what = f"worker {each.worker}"
    if not is_greeted:
        advice = "its address must be reachable from gateways: --host, --advertise-host, firewalls"
        return Finding(Level.WRONG, what, f"does not answer at {each.address}", advice)
    if report is None:
        return Finding(Level.WRONG, what, "no load report over NATS", "is it connected to this NATS? its log tells")
    if no_snapshot:
        return Finding(Level.WRONG, what, f"its blocks cannot be asked for: {no_snapshot}", "NATS loses its messages")
    told = f"{each.role}, {each.state}, {each.engine} at {each.address}, KV events up to {report.seq}"
    return Finding(Level.OK, what, told)


def skew_s(date: datetime, asked_at: float, answered_at: float) -> float:
    """The least that a gateway's clock and ours can be apart.

    date: of an answer's header, whole seconds of a clock that is read about once a second: up to two seconds old.
    asked_at, answered_at: Unix seconds by our clock.
    """
    earliest = date.timestamp()
    return max(earliest - answered_at, 0.0) + min(earliest + _DATE_AGE_S - asked_at, 0.0)


def gateway(told: Mapping[str, Any], metrics: str, *, skew_s: float) -> Iterator[Finding]:
    """told: GET /v1/fleet.  skew_s: its clock against ours."""
    connected = [each for each in told["workers"] if each["is_connected"]]
    level = Level.OK if connected else Level.WRONG
    advice = "" if connected else "does it use this etcd and this namespace? its log tells why it connects to nobody"
    yield Finding(level, "gateway", f"connected to {len(connected)} of {len(told['workers'])} workers", advice)
    for each in told["workers"]:
        if each["refused_because"]:
            yield Finding(
                Level.WRONG, f"gateway and {each['worker']}", each["refused_because"], "see the gateway's log"
            )
    if told["routing"]["refused_because"]:
        because = str(told["routing"]["refused_because"])
        yield Finding(
            Level.WRONG, "routing settings", because, "headrace config NAME=VALUE, or headrace config --clear"
        )
    inexact = _METRIC.search(metrics)
    if inexact is not None and float(inexact[1]) > 0:
        advice = "NATS loses publications between workers and this gateway"
        yield Finding(Level.ODD, "KV events", f"the gateway does not know what {inexact[1]} workers hold", advice)
    elif inexact is not None:
        yield Finding(Level.OK, "KV events", "the gateway knows every worker's blocks")
    if abs(skew_s) > _MOST_SKEW_S:
        advice = "synchronise the clocks of these machines (chrony, NTP)"
        yield Finding(Level.WRONG, "clocks", f"the gateway's is {skew_s:+.0f} s from this machine's", advice)
    for link in told["links"]:
        speed = f"{link['prefill']} → {link['decode']}: {link['bytes_per_s'] / 1e9:.2f} GB/s measured"
        yield Finding(Level.OK, "handovers", speed)
