"""What a simulation found: a row per run, as a table, as JSON and as one self-contained HTML page."""

import base64
import html
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtest.simulator.records import Ending, Record, Result
from loadtest.slo import Slo
from planes.wire.messages import RequestId, Role
from router.fairness import WINDOW_S, ServiceMeter

QUANTILES: Final = tuple(step / 100 for step in range(101))
OURS: Final = "headrace"
_NONE: Final = "-"


class Row(msgspec.Struct, frozen=True):
    """One policy under one load. Seconds; shares are 0 to 1; None where nothing was measured."""

    load: str
    fleet: str
    policy: str
    num_requests: int
    num_finished: int
    num_rejected: int
    num_unfinished: int
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    tpot_p99_s: float | None
    goodput_share: float
    """Requests within the SLO, of all that were sent."""
    goodput_per_s: float
    """The same per second of arrivals."""
    hit_rate: float
    """Prompt tokens found in the computing worker's cache, of all prompt tokens finished."""
    imbalance: float
    """Busy seconds of the busiest worker that prefills over their mean; 1 is even."""
    prefill_utilisation: float
    decode_utilisation: float
    """Busy share of the run; a worker that does both counts in both."""
    handed_over_share: float
    handover_gib: float
    num_preemptions: int
    held_mean_s: float
    ttft_error_p50: float | None
    """Median of |predicted - observed| / observed time to first token, where the policy predicts."""
    duration_s: float
    ttft_quantiles_s: list[float]
    """Percentiles 0 to 100; empty without a single first token."""
    calm_fleet: str = ""
    """The same fleet without faults; empty: this one has none."""
    num_failed: int = 0
    num_kills: int = 0
    num_retries: int = 0
    """Legs that failed before their client had a token …"""
    num_migrations: int = 0
    """… and after."""
    stall_p50_s: float | None = None
    """Of the requests that migrated: median of the pause meanwhile."""
    recomputed_tokens: int = 0
    requests_per_s: float = 0.0
    """Requests finished, from the first sending to the last end …"""
    tokens_per_s: float = 0.0
    """… and tokens of their answers."""
    fairness: float | None = None
    """Jain's index of what tenants got of their even share, mean over the run; None: no two of them asked."""


class Report(msgspec.Struct, frozen=True):
    """Everything that is needed to repeat a comparison, and what came out."""

    settings: dict[str, Any]
    versions: dict[str, str]
    slo: Slo
    rows: list[Row]


def summarise(result: Result, *, load: str, fleet: str, policy: str, slo: Slo, calm_fleet: str = "") -> Row:
    """The row of one run."""
    records = result.records
    finished = [record for record in records if record.ending is Ending.FINISHED]
    ttfts = sorted(record.ttft_s for record in records if record.ttft_s is not None)
    tpots = sorted(record.tpot_s for record in finished if record.tpot_s is not None)
    num_good = sum(is_good(record, slo) for record in finished)
    span_s = max((record.sent_at for record in records), default=0.0) - min((r.sent_at for r in records), default=0.0)
    prefills = [worker.busy_s for worker in result.workers if worker.role is not Role.DECODE]
    decodes = [worker.busy_s for worker in result.workers if worker.role is not Role.PREFILL]
    prompt_tokens = sum(record.prompt_tokens for record in finished)
    return Row(
        load=load,
        fleet=fleet,
        policy=policy,
        num_requests=len(records),
        num_finished=len(finished),
        num_rejected=sum(record.ending is Ending.REJECTED for record in records),
        num_unfinished=sum(record.ending is Ending.UNFINISHED for record in records),
        ttft_mean_s=statistics.fmean(ttfts) if ttfts else None,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p90_s=quantile(ttfts, 0.9),
        ttft_p99_s=quantile(ttfts, 0.99),
        itl_p50_s=result.gaps.quantile(0.5),
        itl_p99_s=result.gaps.quantile(0.99),
        tpot_p99_s=quantile(tpots, 0.99),
        goodput_share=num_good / len(records) if records else 0.0,
        goodput_per_s=num_good / span_s if span_s else 0.0,
        hit_rate=sum(record.cached_tokens for record in finished) / prompt_tokens if prompt_tokens else 0.0,
        imbalance=_imbalance(prefills or decodes),
        prefill_utilisation=_mean(prefills) / result.duration_s if result.duration_s else 0.0,
        decode_utilisation=_mean(decodes) / result.duration_s if result.duration_s else 0.0,
        handed_over_share=_mean([float(record.is_handed_over) for record in finished]),
        handover_gib=sum(worker.sent_bytes for worker in result.workers) / 2**30,
        num_preemptions=sum(record.num_preemptions for record in finished),
        held_mean_s=_mean([record.held_s for record in finished]),
        ttft_error_p50=_prediction_error(finished),
        duration_s=result.duration_s,
        ttft_quantiles_s=[value for q in QUANTILES if (value := quantile(ttfts, q)) is not None],
        calm_fleet=calm_fleet,
        num_failed=sum(record.ending is Ending.FAILED for record in records),
        num_kills=sum(worker.num_kills for worker in result.workers),
        num_retries=sum(record.num_retries for record in records),
        num_migrations=sum(record.num_migrations for record in records),
        stall_p50_s=quantile(sorted(record.stall_s for record in records if record.stall_s), 0.5),
        recomputed_tokens=sum(record.recomputed_tokens for record in records),
        requests_per_s=_per_s(finished, len(finished)),
        tokens_per_s=_per_s(finished, sum(record.completion_tokens for record in finished)),
        fairness=fairness(records),
    )


def fairness(records: Sequence[Record]) -> float | None:
    """Between tenants, as their clients saw it; None if no two of them asked at a time. A gateway measures the same."""
    meter, happened = ServiceMeter(), []
    for number, record in enumerate(records):
        if record.ending in {Ending.REJECTED, Ending.FAILED} and record.first_at is None:
            continue
        happened.append((record.sent_at, False, number))
        if record.first_at is not None:
            happened.append((record.first_at, True, number))
    for now, is_served, number in sorted(happened):
        name, record = RequestId(str(number)), records[number]
        if is_served:
            meter.served(name, now=now)
        else:
            tokens = record.prompt_tokens - record.cached_tokens
            meter.asks(name, record.tenant, tokens, model="", priority=0, now=now)
    if not happened:
        return None
    found = meter.fairness(now=max(now for now, _, _ in happened) + WINDOW_S)
    return found.mean_index if found.num_windows else None


def is_good(record: Record, slo: Slo) -> bool:
    """Whether a request was finished within the SLO."""
    is_finished = record.ending is Ending.FINISHED and record.ttft_s is not None
    return is_finished and slo.is_held(record.ttft_s or 0.0, record.tpot_s or 0.0)


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The least value that is at least as large as a share `q` of `ordered`; None for no values."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else None


def _per_s(finished: Sequence[Record], amount: int) -> float:
    """From the first sending to the last end."""
    ends = [record.last_at for record in finished if record.last_at is not None]
    return amount / (max(ends) - min(record.sent_at for record in finished)) if ends else 0.0


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _imbalance(busy: Sequence[float]) -> float:
    mean = _mean(busy)
    return max(busy) / mean if mean else 1.0


def _prediction_error(finished: Iterable[Record]) -> float | None:
    errors = [
        abs(record.predicted_ttft_s - record.ttft_s) / record.ttft_s
        for record in finished
        if record.predicted_ttft_s is not None and record.ttft_s and record.predicted_ttft_s > record.held_s
    ]
    return statistics.median(errors) if errors else None


# --- tables --------------------------------------------------------------------------------------------------

Column = tuple[str, Callable[[Row], float | None], str, int]
"""Heading, value, format, and which way is better: -1 less, 1 more, 0 neither."""

COLUMNS: Final[Sequence[Column]] = (
    ("TTFT mean s", lambda row: row.ttft_mean_s, ".2f", -1),
    ("p50", lambda row: row.ttft_p50_s, ".2f", -1),
    ("p90", lambda row: row.ttft_p90_s, ".2f", -1),
    ("p99", lambda row: row.ttft_p99_s, ".2f", -1),
    ("ITL p99 ms", lambda row: None if row.itl_p99_s is None else row.itl_p99_s * 1e3, ".1f", -1),
    ("TPOT p99 ms", lambda row: None if row.tpot_p99_s is None else row.tpot_p99_s * 1e3, ".1f", -1),
    ("goodput %", lambda row: row.goodput_share * 100, ".1f", 1),
    ("good/s", lambda row: row.goodput_per_s, ".2f", 1),
    ("requests/s", lambda row: row.requests_per_s, ".2f", 1),
    ("tokens/s", lambda row: row.tokens_per_s, ".0f", 1),
    ("hit rate %", lambda row: row.hit_rate * 100, ".1f", 0),
    ("imbalance", lambda row: row.imbalance, ".2f", 0),
    ("handed over %", lambda row: row.handed_over_share * 100, ".0f", 0),
    ("rejected", lambda row: row.num_rejected, ".0f", -1),
    ("unfinished", lambda row: row.num_unfinished, ".0f", -1),
)


FAIRNESS: Final[Column] = ("fairness", lambda row: row.fairness, ".3f", 1)
"""Beside the others where there are tenants."""


def price_columns(rows: Iterable[Row]) -> Sequence[Column]:
    """What faults came to, and how much worse the same load fared for them than without; `rows` has both."""
    calm = {(row.load, row.fleet, row.policy): row for row in rows}

    def more(value: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
        def difference(row: Row) -> float | None:
            before = calm.get((row.load, row.calm_fleet, row.policy))
            now, then = value(row), None if before is None else value(before)
            return None if now is None or then is None else now - then

        return difference

    return (
        ("kills", lambda row: row.num_kills, ".0f", 0),
        ("failed", lambda row: row.num_failed, ".0f", -1),
        ("retries", lambda row: row.num_retries, ".0f", 0),
        ("migrations", lambda row: row.num_migrations, ".0f", 0),
        ("stall p50 s", lambda row: row.stall_p50_s, ".2f", -1),
        ("tokens computed again", lambda row: row.recomputed_tokens, ".0f", -1),
        ("TTFT mean s", more(lambda row: row.ttft_mean_s), "+.2f", -1),
        ("TTFT p99 s", more(lambda row: row.ttft_p99_s), "+.2f", -1),
        ("ITL p99 ms", more(lambda row: None if row.itl_p99_s is None else row.itl_p99_s * 1e3), "+.1f", -1),
        ("TPOT p99 ms", more(lambda row: None if row.tpot_p99_s is None else row.tpot_p99_s * 1e3), "+.1f", -1),
        ("goodput points", more(lambda row: row.goodput_share * 100), "+.1f", 1),
    )


def _cells(row: Row, columns: Sequence[Column]) -> list[str]:
    values = [value(row) for _, value, _, _ in columns]
    return [_NONE if cell is None else f"{cell:{column[2]}}" for cell, column in zip(values, columns, strict=True)]


def _best(rows: Sequence[Row], columns: Sequence[Column]) -> list[str | None]:
    """The best text of each column, None where none is better than another."""
    texts = [_cells(row, columns) for row in rows]
    best: list[str | None] = []
    for index, (_, _, _, sign) in enumerate(columns):
        column = [text[index] for text in texts if text[index] != _NONE]
        is_decided = sign != 0 and len(set(column)) > 1
        best.append(max(column, key=lambda text: sign * float(text)) if is_decided else None)
    return best


def slug(title: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in title).split())


def by_load(rows: Iterable[Row]) -> Iterable[tuple[str, list[Row]]]:
    for title, group in groupby(rows, key=lambda row: f"{row.load}, {row.fleet}"):
        yield title, list(group)


def tables(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row], Sequence[Column]]]:
    """Title, rows and columns of each table: one per load, and one more where there were faults."""
    for title, group in by_load(rows):
        yield title, group, (*COLUMNS, FAIRNESS) if any(row.fairness is not None for row in group) else COLUMNS
        if group[0].calm_fleet:
            yield f"{title}: what that costs", group, price_columns(rows)


def table(rows: Sequence[Row]) -> str:
    """For a terminal: one block per table, aligned."""
    lines = []
    for title, group, columns in tables(rows):
        texts = [[row.policy, *_cells(row, columns)] for row in group]
        cells = [["policy", *(heading for heading, *_ in columns)], *texts]
        widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
        lines.append(f"\n{title} ({group[0].num_requests} requests)")
        for line in cells:
            first, *others = (text.rjust(width) for text, width in zip(line, widths, strict=True))
            lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """One table per load and what its faults cost; the best of each column is bold."""
    parts = []
    for title, group, columns in tables(rows):
        best = _best(group, columns)
        parts += ["", f"### {title}", "", "| policy | " + " | ".join(heading for heading, *_ in columns) + " |"]
        parts.append("|---|" + "--:|" * len(columns))
        for row in group:
            texts = [f"**{t}**" if t == b else t for t, b in zip(_cells(row, columns), best, strict=True)]
            parts.append(f"| {row.policy} | " + " | ".join(texts) + " |")
    return "\n".join(parts) + "\n"


# --- one page ------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Headrace: routing rules compared</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 13px; }}
th, td {{ padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd; }}
th {{ cursor: pointer; position: sticky; top: 0; background: #fff; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.ours {{ background: #eef6ff; }}  td.best {{ font-weight: 700; }}
img {{ max-width: 100%; }}  pre {{ background: #f6f6f6; padding: .6rem; overflow: auto; }}
</style>
<h1>Routing rules compared</h1>
<p>A click on a heading sorts; the best of a column is bold. SLO: first token within {ttft} s, mean time between tokens
within {tpot} ms.</p>
{body}
<h2>Settings</h2>
<pre>{settings}</pre>
<script>
for (const th of document.querySelectorAll("th")) th.onclick = () => {{
  const body = th.closest("table").tBodies[0], at = th.cellIndex, up = th.dataset.up = th.dataset.up === "1" ? "" : "1";
  const value = row => parseFloat(row.cells[at].textContent);
  const order = (a, b) => at === 0 || isNaN(value(a) + value(b))
    ? a.cells[at].textContent.localeCompare(b.cells[at].textContent) : value(a) - value(b);
  [...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)).forEach(row => body.append(row));
}};
</script>
</html>
"""


def page(report: Report, images: dict[str, bytes]) -> str:
    """One HTML page with everything in it; `images` from `loadtest.plots`."""
    parts = [_picture("goodput.png", images)]
    for title, group, columns in tables(report.rows):
        parts += [f"<h2>{html.escape(title)}</h2>", _html_table(group, columns)]
        if columns is COLUMNS:
            parts.append(_picture(f"ttft-{slug(title)}.png", images))
    settings = msgspec.json.format(msgspec.json.encode({"settings": report.settings, "versions": report.versions}))
    return _PAGE.format(
        ttft=f"{report.slo.ttft_s:g}",
        tpot=f"{report.slo.tpot_s * 1e3:g}",
        body="\n".join(parts),
        settings=html.escape(settings.decode()),
    )


def _html_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    best = _best(rows, columns)
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in ("policy", *(column[0] for column in columns)))
    lines = []
    for row in rows:
        cells = "".join(
            f'<td class="best">{text}</td>' if text == top else f"<td>{text}</td>"
            for text, top in zip(_cells(row, columns), best, strict=True)
        )
        mark = ' class="ours"' if row.policy == OURS else ""
        lines.append(f"<tr{mark}><td>{html.escape(row.policy)}</td>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _picture(name: str, images: dict[str, bytes]) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(images[name]).decode()}">'


def write(report: Report, *, json: Path | None = None, folder: Path | None = None) -> None:
    """Write the JSON, and the plots and the page into `folder`. Parents are made."""
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if folder is not None:
        from loadtest.plots import plots  # noqa: PLC0415 - matplotlib, which the tables do without

        folder.mkdir(parents=True, exist_ok=True)
        images = plots(report.rows)
        for name, image in images.items():
            (folder / name).write_bytes(image)
        (folder / "index.html").write_text(page(report, images))
