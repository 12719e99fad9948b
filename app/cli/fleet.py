"""`headrace fleet`: what is registered in etcd and what its workers last reported over NATS, as a table.

On a terminal the table stays and follows every change until Ctrl-C; elsewhere it is printed once.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from app.fleet.autorole import OFFICE, DecidedRoles
from app.fleet.split import splits_of
from planes.control import Etcd, WorkerDirectory, watch_keys
from planes.election import office_key
from planes.events import EventPlane
from planes.role_wishes import watch_role_wishes
from planes.wire.errors import HeadraceError, UnusableSetting
from planes.wire.messages import LoadReport, Registration, RoleWish, WorkerId
from planes.wire.unreadable import UNREADABLE
from planes.wire.urls import redacted
from process.logging import configure, printable
from process.settings import PlaneSettings

REPORT_WAIT_S = 5.0
"""Idle workers report every second, on machines that have nothing else to do."""
_REFRESH_S = 1.0
_POLL_S = 0.05
_FILE_WIDTH = 250
"""Lines in a file or a pipe may be longer than those on a terminal."""


class NoAnswer(HeadraceError):  # noqa: N818 - names the outcome
    """etcd did not answer."""

    code = "no_answer"

    def __init__(self, etcd: str, timeout_s: float) -> None:
        super().__init__(f"etcd at {redacted(etcd)} did not answer within {timeout_s:g} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTableSettings(PlaneSettings):
    """Where to look."""

    once: Annotated[bool, Parameter(help="Print the table once, on a terminal too.")] = False
    timeout_s: Annotated[float, Parameter(help="Longest wait for etcd, in seconds.")] = 5.0

    def __post_init__(self) -> None:
        PlaneSettings.__post_init__(self)
        if not self.timeout_s > 0:
            raise UnusableSetting("timeout_s", self.timeout_s, "it must be more than 0 seconds")


class FleetTable:
    """The rows, kept current by etcd's watch and by load reports."""

    def __init__(self) -> None:
        self.registrations: dict[WorkerId, Registration] = {}
        self.reports: dict[WorkerId, LoadReport] = {}
        self.wishes: dict[WorkerId, RoleWish] = {}
        self.decided: DecidedRoles | None = None

    def up(self, registration: Registration) -> None:
        self.registrations[registration.worker] = registration

    def down(self, worker: WorkerId) -> None:
        self.registrations.pop(worker, None)
        self.reports.pop(worker, None)

    def reported(self, report: LoadReport) -> None:
        if report.worker in self.registrations:
            self.reports[report.worker] = report

    def wished(self, worker: WorkerId, wish: RoleWish | None) -> None:
        self.wishes.pop(worker, None)
        if wish is not None:
            self.wishes[worker] = wish

    def autorole(self, _: bytes, value: bytes | None) -> None:
        """What `--autorole` has decided last; what this version cannot read is left out."""
        try:
            self.decided = None if value is None else msgspec.json.decode(value, type=DecidedRoles)
        except UNREADABLE:
            self.decided = None

    def role(self, entry: Registration) -> str:
        """What it is, what it becomes, what it was asked to be and has not answered; pinned: by hand."""
        pinned = ", pinned" if entry.is_pinned else ""
        if entry.becoming is not None:
            return f"{entry.role} → {entry.becoming}{pinned}"
        wish = self.wishes.get(entry.worker)
        is_open = wish is not None and wish.epoch == entry.epoch and wish.role is not entry.role
        return f"{entry.role} (asked: {wish.role})" if wish is not None and is_open else f"{entry.role}{pinned}"

    def table(self, namespace: str) -> Table:
        title = f"fleet {namespace!r}: {len(self.registrations)} workers"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("worker", "role", "model", "card", "engine", "layout", "state", "address"):
            table.add_column(column, overflow="fold", no_wrap=column in ("worker", "role", "state"))
        for column in ("run", "wait", "free blocks", "held"):
            table.add_column(column, justify="right", no_wrap=True)
        for worker, entry in sorted(self.registrations.items()):
            report = self.reports.get(worker)
            load = ["?"] * 4
            if report is not None:
                free = f"{report.free_blocks}/{entry.facts.num_blocks}"
                load = [str(report.num_running), str(report.num_waiting), free, str(report.num_cached)]
            told = (entry.model, entry.card_digest[:8], entry.engine, entry.layout[:8])
            row = (worker, self.role(entry), *told, entry.state, entry.address, *load)
            # As text: rich would read a plain string as markup, and an IPv6 address in brackets looks like it.
            table.add_row(*(Text(printable(cell)) for cell in row))
        return table

    def shown(self, namespace: str) -> Group:
        """The table, and below it where its workers disagree, and what `--autorole` has decided last."""
        warnings = [Text(printable(f"warning: {reason}")) for reason in splits_of(self.registrations.values()).values()]
        decided = [] if self.decided is None else self.decided.decisions
        roles = [Text(printable(f"autorole, {each.model}: {each.code}: {each.reason}")) for each in decided]
        return Group(self.table(namespace), *warnings, *roles)


async def show(settings: FleetTableSettings) -> int:
    """Returns the exit status.  Raises:  NoAnswer if etcd does not answer in time."""
    configure("error")
    fleet = FleetTable()
    etcd = Etcd(settings.etcd, security=settings.etcd_security)
    directory = WorkerDirectory(etcd, settings.namespace, on_up=fleet.up, on_down=fleet.down)
    events = EventPlane(settings.nats, settings.namespace, security=settings.nats_security)
    await events.subscribe_load(fleet.reported)
    async with asyncio.TaskGroup() as group:
        wishes = watch_role_wishes(etcd, settings.namespace, fleet.wished)
        decided = watch_keys(etcd, "autorole", office_key(settings.namespace, OFFICE), fleet.autorole)
        tasks = [group.create_task(work) for work in (directory.run(), events.run(), wishes, decided)]
        is_known = await within(settings.timeout_s, lambda: directory.is_current)
        if is_known:
            await within(REPORT_WAIT_S, lambda: len(fleet.reports) == len(fleet.registrations))
            await _print(fleet, settings)
        for task in tasks:
            task.cancel()
    if not is_known:
        raise NoAnswer(settings.etcd, settings.timeout_s)
    return 0


async def _print(fleet: FleetTable, settings: FleetTableSettings) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    if settings.once or not console.is_terminal:
        console.print(fleet.shown(settings.namespace))
        return
    with Live(fleet.shown(settings.namespace), console=console, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(_REFRESH_S)
            live.update(fleet.shown(settings.namespace), refresh=True)


async def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    """Whether it becomes so in time."""
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:  # noqa: ASYNC110 - a person waits, once
        await asyncio.sleep(_POLL_S)
    return is_so()
