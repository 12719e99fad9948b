"""`headrace top`: what the fleet does now, in the terminal; asked of a gateway every second.

A number a second is the difference of two looks at the gateway's counters.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from app.cli.gateway_url import GatewayClient, GatewayRefused, GatewayUrlSettings
from planes.wire.errors import UnusableSetting
from process.logging import printable

_RATES = (
    ("requests", "headrace_requests_total", 1.0),
    ("generated tokens", "headrace_completion_tokens_total", 1.0),
    ("prompt tokens", "headrace_prompt_tokens_total", 1.0),
    ("cached tokens", "headrace_cached_tokens_total", 1.0),
    ("handover MB", "headrace_handover_bytes_total", 1e-6),
    ("refused", "headrace_refusals_total", 1.0),
    ("migrated", "headrace_migrations_total", 1.0),
)
_MEANS = (("first token", "headrace_ttft_seconds"), ("between tokens", "headrace_itl_seconds"))
_BAR = 10
_FILE_WIDTH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TopSettings(GatewayUrlSettings):
    """Which gateway is asked, and how often."""

    every_s: Annotated[float, Parameter(help="Seconds between two looks.")] = 1.0
    once: Annotated[bool, Parameter(help="Look twice, print once and end, on a terminal too.", negative="")] = False

    def __post_init__(self) -> None:
        GatewayUrlSettings.__post_init__(self)
        if not 0.1 <= self.every_s <= 3600:
            raise UnusableSetting("every_s", self.every_s, "it must be 0.1 to 3600 seconds")


@dataclass(frozen=True, slots=True)
class Look:
    """at: seconds on any clock.  totals: counters by name, summed over their labels."""

    at: float
    fleet: Mapping[str, Any]
    totals: Mapping[str, float]


def top(settings: TopSettings) -> None:
    """Show it until Ctrl-C, or once where nobody watches.  Raises:  GatewayRefused."""
    client, console = GatewayClient(settings), Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    before = look(client)
    time.sleep(settings.every_s)
    if settings.once or not console.is_terminal:
        console.print(shown(before, look(client)))
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            try:
                now = look(client)
                live.update(shown(before, now), refresh=True)
                before = now
            except GatewayRefused as exc:  # it may come back
                live.update(Text(printable(str(exc))), refresh=True)
            time.sleep(settings.every_s)


def look(client: GatewayClient) -> Look:
    """Ask now."""
    fleet, text = client.get("/v1/fleet"), client.text("/metrics")
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return Look(time.monotonic(), fleet, totals)


def shown(before: Look, now: Look) -> Group:
    """For a terminal."""
    return Group(_rates(before, now), _workers(now.fleet), *(Text(printable(each)) for each in now.fleet["warnings"]))


def _rates(before: Look, now: Look) -> Text:
    elapsed = max(1e-9, now.at - before.at)
    told = [f"{now.fleet['num_waiting']} waiting"]
    for title, name, unit in _RATES:
        told.append(f"{_difference(before, now, name) * unit / elapsed:.1f} {title}/s")
    for title, name in _MEANS:
        count = _difference(before, now, f"{name}_count")
        if count > 0:
            told.append(f"{title} {_difference(before, now, f'{name}_sum') / count * 1e3:.0f} ms")
    return Text(" · ".join(told))


def _difference(before: Look, now: Look, name: str) -> float:
    """Never negative: a gateway may have started anew between two looks."""
    return max(0.0, now.totals.get(name, 0.0) - before.totals.get(name, 0.0))


def _workers(fleet: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("worker", "role", "model", "state"):
        table.add_column(column, overflow="fold", no_wrap=column == "role")
    for column in ("streams", "run", "wait", "KV in use"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in sorted(fleet["workers"], key=lambda worker: (worker["model"], worker["role"], worker["worker"])):
        load, blocks = each["load"], each["facts"]["num_blocks"]
        numbers, bar = ("?", "?", "?"), ""
        if load is not None:
            share = 1 - load["free_blocks"] / blocks if blocks else 0.0
            numbers = (str(load["num_running"]), str(load["num_waiting"]), f"{share:.0%}")
            bar = f"{'█' * round(share * _BAR)}{'·' * (_BAR - round(share * _BAR))}"
        role = f"{each['role']} → {each['becoming']}" if each.get("becoming") else each["role"]
        row = (each["worker"], role, each["model"], _state(each), str(each["num_streams"]), *numbers, bar)
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _state(worker: Mapping[str, Any]) -> str:
    if worker["refused_because"]:
        return f"refused: {worker['refused_because']}"
    return str(worker["state"]) if worker["is_connected"] else "not connected"
