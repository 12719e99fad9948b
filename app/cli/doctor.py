"""`headrace doctor`: looks at this machine, etcd, NATS, every worker and a gateway, and says what to do.

Exit status 1 if something is wrong, for scripts.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import resource
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from app.cli import findings
from app.cli.findings import Finding, Level
from app.cli.fleet import REPORT_WAIT_S, within
from app.cli.gateway_url import GatewayClient, GatewayRefused, GatewayUrlSettings
from planes.control import ControlPlaneUnavailable, Etcd, get_workers
from planes.events import EventPlane, EventPlaneUnavailable
from planes.security.tls import client_tls
from planes.streams.client import greets
from planes.streams.greeting import StreamKeys
from planes.wire.errors import HeadraceError
from planes.wire.messages import LoadReport, Registration, WorkerId
from planes.wire.urls import parse_etcd, redacted
from process.logging import configure, printable
from process.settings import PlaneSettings

_PATIENCE_S = 5.0
_DATE_REFRESH_S = 1.5
"""After which a gateway's `Date` is another."""
_STYLES = {Level.OK: "green", Level.ODD: "yellow", Level.WRONG: "bold red"}
_NIXL_WHEELS = ("nixl_cu13", "nixl_cu12")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings(PlaneSettings):
    """Where to look."""

    url: Annotated[str, Parameter(help="URL of the gateway.")] = "http://127.0.0.1:8000"
    api_key: Annotated[str | None, Parameter(help="Key to ask with; better told by the variable.")] = None

    def __post_init__(self) -> None:
        PlaneSettings.__post_init__(self)
        self.gateway  # noqa: B018 - it checks the url

    @property
    def gateway(self) -> GatewayUrlSettings:
        return GatewayUrlSettings(url=self.url, api_key=self.api_key)


async def examine(settings: DoctorSettings) -> int:
    """Print every finding.  Returns:  the exit status."""
    configure("error")
    console, worst = Console(highlight=False), Level.OK
    async for finding in _findings(settings):
        worst = max(worst, finding.level, key=list(Level).index)
        line = Text(f"{finding.level:<6}", style=_STYLES[finding.level])
        line.append(printable(f"{finding.what}: {finding.told}"), style="default")
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(Text(printable(f"       {finding.advice}")), soft_wrap=True)
    return 1 if worst is Level.WRONG else 0


async def _findings(settings: DoctorSettings) -> AsyncIterator[Finding]:
    for each in this_machine():
        yield each
    workers: dict[WorkerId, Registration] | None = None
    try:
        etcd = Etcd(settings.etcd, security=settings.etcd_security)
        workers = await asyncio.wait_for(get_workers(etcd, settings.namespace), _PATIENCE_S)
    except (ControlPlaneUnavailable, TimeoutError) as exc:
        advice = "start it (headrace etcd), or say where it is with --etcd"
        yield Finding(Level.WRONG, "etcd", f"{redacted(settings.etcd)}: {exc or 'no answer'}", advice)
    else:
        yield Finding(Level.OK, "etcd", f"{redacted(settings.etcd)}, namespace {settings.namespace!r}")
        yield findings.etcd_version(await asyncio.to_thread(_etcd_version, settings))
    for each in await _planes(settings, workers):
        yield each
    for each in await asyncio.to_thread(_gateway, settings):
        yield each


def this_machine() -> Iterator[Finding]:
    """What any process of ours here would meet."""
    yield findings.file_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    wheel = next((name for name in _NIXL_WHEELS if importlib.util.find_spec(name) is not None), None)
    ports = {}
    for state in Path("/sys/class/infiniband").glob("*/ports/*/state"):
        with contextlib.suppress(OSError):
            ports[f"{state.parents[2].name}:{state.parent.name}"] = state.read_text().strip()
    yield from findings.nixl(wheel, ports, os.environ.get("UCX_TLS"))


async def _planes(settings: DoctorSettings, workers: dict[WorkerId, Registration] | None) -> list[Finding]:
    """NATS and the workers behind it."""
    plane = EventPlane(settings.nats, settings.namespace, security=settings.nats_security, name="doctor")
    keys, reports = StreamKeys(settings.stream_security), dict[WorkerId, LoadReport]()
    found: list[Finding] = []

    def reported(report: LoadReport) -> None:
        reports[report.worker] = report

    await plane.subscribe_load(reported)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(plane.run())
        try:
            found += await _nats(plane, settings)
            if workers is not None:
                greeted = [each.worker for each in workers.values() if await greets(each, keys=keys)]
                await within(REPORT_WAIT_S, lambda: len(reports) >= len(workers))
                snapshots = {worker: await _snapshot(plane, worker) for worker in greeted}
                found += findings.fleet(workers.values(), reports, frozenset(greeted), snapshots, wall_now=time.time())
        finally:
            running.cancel()
    return found


async def _nats(plane: EventPlane, settings: DoctorSettings) -> list[Finding]:
    told = redacted(settings.nats)
    try:
        await plane.wait_connected(_PATIENCE_S)
    except (EventPlaneUnavailable, TimeoutError) as exc:
        advice = "start it (headrace nats), or say where it is with --nats"
        return [Finding(Level.WRONG, "NATS", f"{told}: {exc or 'no answer'}", advice)]
    try:
        account = await plane.jetstream("INFO")
    except HeadraceError as exc:
        advice = "start NATS with JetStream (-js): model cards, responses and the prefill queue are kept there"
        return [Finding(Level.OK, "NATS", told), Finding(Level.WRONG, "JetStream", str(exc), advice)]
    kept = f"{account.get('streams', 0)} streams, {account.get('storage', 0):,} bytes"
    return [Finding(Level.OK, "NATS", told), Finding(Level.OK, "JetStream", kept)]


async def _snapshot(plane: EventPlane, worker: WorkerId) -> str:
    """Why its blocks cannot be had; empty: they can."""
    try:
        await plane.request_snapshot(worker, _PATIENCE_S)
    except EventPlaneUnavailable as exc:
        return str(exc)
    return ""


def _etcd_version(settings: DoctorSettings) -> str | None:
    address = parse_etcd(settings.etcd)
    host, port = address.endpoints[0]
    url = f"{'https' if address.is_tls else 'http'}://{host}:{port}/version"
    tls = client_tls(settings.etcd_security.tls)() if address.is_tls else None
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S, context=tls) as response:  # noqa: S310 - checked
            return str(json.load(response)["etcdserver"])
    except (OSError, ValueError, KeyError):
        return None


def _skew_s(client: GatewayClient) -> float:
    """Raises:  GatewayRefused."""
    asked_at = time.time()
    with client.opened("/live") as response:
        date = response.headers.get("date")
    return 0.0 if date is None else findings.skew_s(parsedate_to_datetime(date), asked_at, time.time())


def _gateway(settings: DoctorSettings) -> list[Finding]:
    client = GatewayClient(settings.gateway)
    try:
        told = client.get("/v1/fleet")
        skew_s = _skew_s(client)
        if skew_s:  # it may have been told by a clock that had no turn
            time.sleep(_DATE_REFRESH_S)
            skew_s = min(skew_s, _skew_s(client), key=abs)
        metrics = client.text("/metrics")
    except GatewayRefused as exc:
        advice = (
            "start it (headrace gateway), or say where it is with --url (its --admin-port, if it has one), and show an "
            "admin's --api-key if it asks for one"
        )
        return [Finding(Level.WRONG, "gateway", str(exc), advice)]
    return list(findings.gateway(told, metrics, skew_s=skew_s))
