"""What a simulation found, drawn. The one module that needs matplotlib, which comes with the development group."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from loadtest.grid.axes import AXES
from loadtest.grid.verdict import CellResult, verdict
from loadtest.plan.report import Plan
from loadtest.plan.trial import Trial
from loadtest.report import OURS, QUANTILES, Row, by_load, slug


def plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG images by file name: per load the distribution of TTFT, and one of goodput over all loads."""
    images = {}
    for title, group in by_load(rows):
        images[f"ttft-{slug(title)}.png"] = _ttft_plot(title, group)
    images["goodput.png"] = _goodput_plot(rows)
    return images


def _ttft_plot(title: str, rows: Sequence[Row]) -> bytes:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        if row.ttft_quantiles_s:
            style = _style(row.policy, number)
            axes.plot(row.ttft_quantiles_s, [100 * q for q in QUANTILES], label=row.policy, **style)
    axes.set(xscale="log", xlabel="time to first token, s", ylabel="% of requests", title=title, ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return _png(figure)


def _goodput_plot(rows: Sequence[Row]) -> bytes:
    loads = [title for title, _ in by_load(rows)]
    figure = Figure(figsize=(10, 0.6 * len(loads) + 2), layout="constrained")
    axes = figure.subplots()
    for number, policy in enumerate(dict.fromkeys(row.policy for row in rows)):
        own = [row for row in rows if row.policy == policy]
        places = [loads.index(f"{row.load}, {row.fleet}") for row in own]
        style = _style(policy, number)
        size = 90 if policy == OURS else 30
        axes.scatter(
            [100 * row.goodput_share for row in own],
            places,
            label=policy,
            color=style["color"],
            s=size,
            marker="D" if policy == OURS else "o",
            alpha=0.8,
            zorder=style["zorder"],
        )
    axes.set_yticks(range(len(loads)), loads)
    axes.invert_yaxis()
    axes.set(xlabel="% of requests within the SLO", xlim=(-2, 102), title="Goodput")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def _style(policy: str, number: int) -> dict[str, Any]:
    if policy == OURS:
        return {"color": "black", "linewidth": 2.5, "zorder": 3}
    return {"color": colormaps["tab20"](number % 20), "linewidth": 1.2, "zorder": 2}


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def heat_map(cells: Sequence[CellResult]) -> bytes:
    """A square a cell: green where headrace is ahead of the best other rule, red where it is behind.

    Lengths are the rows, engines the columns; the squares of a field differ in what is left. A loss bears its number.
    """
    rows = [f"{prompts} in, {answers} out" for prompts in AXES["prompts"] for answers in AXES["answers"]]
    columns = [f"{prefill // 1000}k/s\n{step} ms" for prefill in AXES["prefill"] for step in AXES["step_ms"]]
    fields: dict[tuple[int, int], list[CellResult]] = {}
    for cell in cells:
        if cell.values:
            of = cell.values
            row = rows.index(f"{of['prompts']} in, {of['answers']} out")
            column = columns.index(f"{of['prefill'] // 1000}k/s\n{of['step_ms']} ms")
            fields.setdefault((row, column), []).append(cell)
    for column, cell in enumerate(cell for cell in cells if not cell.values):
        fields[len(rows), column % len(columns)] = [cell]
    figure = Figure(figsize=(13, 11), layout="constrained")
    axes = figure.subplots()
    colours, norm = colormaps["RdYlGn"], Normalize(-_FAR, _FAR)
    for (row, column), group in fields.items():
        for place, cell in enumerate(group):
            _square(axes, cell, column + place / len(group), row, 1 / len(group), lambda lead: colours(norm(lead)))
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns)
    axes.set_yticks([row + 0.5 for row in range(len(rows) + 1)], [*rows, "named"])
    axes.set(xlim=(0, len(columns)), ylim=(len(rows) + 1, 0), xlabel="prompt tokens computed a second, decode step")
    axes.set_title("headrace against the best other rule: goodput, and throughput where clients wait for answers")
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, shrink=0.5, extend="both")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.set_label("ahead (+) or behind (-)")
    return _png(figure)


_FAR = 0.2
"""Lead at which a colour is full."""


def _square(axes: Any, cell: CellResult, x: float, y: int, width: float, colour: Callable[[float], Any]) -> None:
    found = verdict(cell)
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=colour(found.lead), edgecolor="white", linewidth=0.5))
    if found.losses:
        size = 7 if cell.values else 5
        axes.text(x + width / 2, y + 0.5, cell.name, ha="center", va="center", fontsize=size, rotation=0)


def plan_picture(plan: Plan) -> bytes:
    """How many times the SLO the best fleet of each size takes at p99; below the line it holds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, kind, colour in (("both", plan.both, "tab:blue"), ("prefill + decode", plan.split, "tab:orange")):
        best: dict[int, Trial] = {}
        for trial in kind:
            number = trial.fleet.workers
            best[number] = min(best.get(number, trial), trial, key=lambda each: each.miss)
        line = [best[number] for number in sorted(best)]
        workers = [trial.fleet.workers for trial in line]
        ttfts, itls = (
            [min(each.ttft_miss, _FARTHEST) for each in line],
            [min(each.itl_miss, _FARTHEST) for each in line],
        )
        axes.plot(workers, ttfts, "o-", color=colour, label=f"TTFT, {name}")
        axes.plot(workers, itls, "s--", color=colour, label=f"ITL, {name}")
        for trial in line:
            place = (trial.fleet.workers, min(trial.miss, _FARTHEST))
            roles = f"{trial.fleet.num_prefill}+{trial.fleet.num_decode}"
            axes.annotate(roles if trial.fleet.num_prefill else "", place, xytext=(3, 5), textcoords="offset points")
    axes.axhline(1.0, color="tab:red", linewidth=1)
    if plan.best is not None:
        axes.axvline(plan.best.fleet.workers, color="tab:green", linewidth=1)
        axes.set_title(f"{plan.best.fleet} hold p99 within {plan.slo.ttft_s:g} s and {plan.slo.tpot_s * 1e3:g} ms")
    axes.set(yscale="log", xlabel="workers", ylabel="p99 over its SLO")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


_FARTHEST = 100.0
"""Farther misses, endless ones among them, are drawn here."""
