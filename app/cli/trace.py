"""`headrace trace`: where one request's time went, and why it went where it went."""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.cli.gateway_url import GatewayClient, GatewayUrlSettings
from process.logging import printable

_BAR = 32
_MAX_CANDIDATES = 12
_PARTS = ("queue_s", "prefill_s", "handover_s", "first_step_s", "decode_s", "inflicted_s", "total_s")
_FILE_WIDTH = 200


def trace(request_id: str, settings: GatewayUrlSettings) -> None:
    """Print it.  Raises:  GatewayRefused."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    client = GatewayClient(settings)
    if request_id:
        console.print(traced(client.get(f"/v1/routes/{request_id}")))
    else:
        console.print(listed(client.get("/v1/routes", limit=20)["data"]))


def traced(told: dict[str, Any]) -> Group:
    """What `GET /v1/routes/{request_id}` says, for a terminal."""
    return Group(*_traced(told))


def _traced(told: dict[str, Any]) -> Iterator[RenderableType]:
    timeline = told.get("timeline")
    if timeline is None:
        yield _text(f"{told['request']}: it has not ended")
    else:
        yield _text(
            f"{told['request']} {timeline['model']}: {timeline['code']} after {_seconds(timeline['end_s'])}; "
            f"{timeline['prompt_tokens']} prompt tokens ({timeline['cached_tokens']} cached), "
            f"{timeline['completion_tokens']} generated; first token {_seconds(timeline['ttft_s'])}, "
            f"mean gap {_seconds(timeline['itl_s'])}, gateway {_seconds(timeline['overhead_s'])}"
        )
        yield _stages(timeline)
        for each in timeline["interruptions"]:
            what = "its answer went on elsewhere" if each["is_migration"] else "it was tried again"
            at = f"at {_seconds(each['at_s'])} attempt {each['attempt']} failed"
            yield _text(f"{at}: {each['code']} ({each['worker'] or 'no worker'}); {what}")
    for attempt in (*told["earlier"], told):
        yield from _decision(attempt)


def _stages(timeline: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("attempt", "stage", "worker", "from", "seconds", "", "what"):
        table.add_column(column, justify="right" if column in ("attempt", "from", "seconds") else "left", no_wrap=True)
    for stage in timeline["stages"]:
        place = f"{stage['source']} → {stage['worker']}" if stage["source"] else stage["worker"] or "gateway"
        seconds = stage["end_s"] - stage["begin_s"]
        row = (str(stage["attempt"]), stage["kind"], place, _seconds(stage["begin_s"]), _seconds(seconds))
        table.add_row(*map(_text, (*row, _bar(stage, timeline["end_s"]), _what(stage))))
    return table


def _bar(stage: dict[str, Any], whole_s: float) -> str:
    """Where in the whole it lies; a stage that took any time is seen."""
    if whole_s <= 0:
        return ""
    begin = min(_BAR - 1, int(stage["begin_s"] / whole_s * _BAR))
    end: int = min(_BAR, max(begin + 1, round(stage["end_s"] / whole_s * _BAR)))
    return f"{'·' * begin}{'█' * (end - begin)}{'·' * (_BAR - end)}"


def _what(stage: dict[str, Any]) -> str:
    match stage["kind"]:
        case "prefill":
            return f"{stage['tokens']} tokens computed, {stage['cached_tokens']} cached"
        case "handover":
            return f"{int(stage['num_bytes']):,} bytes"
        case "decode":
            return f"{stage['tokens']} tokens"
        case _:
            return ""


def _decision(told: dict[str, Any]) -> Iterator[RenderableType]:
    yield _text("")
    held = f", held {_seconds(told['held_s'])}" if told["held_s"] else ""
    because = f" ({told['held_because']})" if told["held_because"] else ""
    yield _text(f"attempt {told['attempt']}: {told['policy']} weighed {len(told['candidates'])} ways{held}{because}")
    if told["refused_because"]:
        yield _text(f"refused: {told['refused_because']}")
    if not told["candidates"]:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "prefill", "decode"):
        table.add_column(column, no_wrap=True)
    for column in ("cached", *(part.removesuffix("_s") for part in _PARTS)):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("gives up")
    ordered = sorted(told["candidates"], key=lambda each: (each != told["chosen"], each["total_s"]))
    for each in ordered[:_MAX_CANDIDATES]:
        names = ("→" if each == told["chosen"] else "", each["prefill"] or "(same)", each["decode"])
        numbers = (str(each["cached_tokens"]), *(_seconds(each[part]) for part in _PARTS))
        table.add_row(*map(_text, (*names, *numbers, each["gives_up"])))
    yield table
    if len(ordered) > _MAX_CANDIDATES:
        yield _text(f"and {len(ordered) - _MAX_CANDIDATES} more")


def listed(timelines: list[dict[str, Any]]) -> RenderableType:
    """The last requests, a line each."""
    if not timelines:
        return _text("no request has ended yet")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("request", "model", "code", "prefill", "decode"):
        table.add_column(column, no_wrap=True)
    for column in ("prompt", "cached", "generated", "first token", "seconds", "failed attempts"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in timelines:
        names = (each["request"], each["model"], each["code"], each["prefill"] or "", each["decode"] or "")
        counts = (str(each[name]) for name in ("prompt_tokens", "cached_tokens", "completion_tokens"))
        times = (_seconds(each["ttft_s"]), _seconds(each["end_s"]), str(len(each["interruptions"])))
        table.add_row(*map(_text, (*names, *counts, *times)))
    return table


def _seconds(value: float | None) -> str:
    """With three digits that mean something."""
    if value is None:
        return "-"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if abs(value) >= 1e-3 or value == 0 else f"{value * 1e6:.0f} µs"


def _text(value: str) -> Text:
    """Not as rich's markup: names come from outside."""
    return Text(printable(value))
