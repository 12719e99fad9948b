"""What a simulation found, drawn. The one module that needs matplotlib, which comes with the development group."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

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
