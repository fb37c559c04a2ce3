"""The picture of a run: its loss over the updates, read from metrics.csv."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter


def plot_loss(
    metrics_path: Path, picture_path: Path, *, title: str, unigram_perplexity: float | None, of_rows: bool = False
) -> None:
    """Training loss raw and smoothed, validation points, the unigram line and small marks where a basis moved.

    `of_rows`: the loss is that of whole rows, as of GLUE's tasks, and no token's: it has no perplexity.
    """
    with metrics_path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    losses = [float(row["train/loss"]) for row in rows]
    validated = [(int(row["step"]), float(row["val/loss"])) for row in rows if row["val/loss"]]
    refreshed = [int(row["step"]) for row in rows if float(row["optim/refreshes"] or 0) > 0]
    happened = [(int(row["step"]), row["events"].partition(" x")[0]) for row in rows if row.get("events")]
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")  # not pyplot: no display, no global state
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each update")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    if validated:
        perplexity = math.exp(min(validated[-1][1], 700))
        of_tokens = "" if of_rows else f" = perplexity {perplexity:.1f}"
        axes.plot(
            *zip(*validated, strict=True),
            color="tab:orange",
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=f"validation ({validated[-1][1]:.3f}{of_tokens})",
        )
    if unigram_perplexity is not None:
        axes.axhline(
            math.log(unigram_perplexity),
            color="tab:gray",
            linestyle="--",
            linewidth=1,
            label=f"unigram ({math.log(unigram_perplexity):.3f} = perplexity {unigram_perplexity:.0f})",
        )
    if refreshed:
        mark_refreshes(axes, refreshed)
    mark_events(axes, happened)
    dress(axes, title, losses, [loss for _, loss in validated])
    if of_rows:
        axes.set_ylabel("loss, mean over rows")
    axes.set_xlim(0, max(steps, default=1))
    aside = picture_path.with_name(picture_path.name + ".partial")
    figure.savefig(aside, format="png")
    aside.replace(picture_path)


def smoothed(values: list[float], side: float = 0.01) -> list[float]:
    """Mean over the values around each, on either side a hundredth of the run (`side`): it does not lag behind.
    Near the start, where the loss is steep, both sides shrink alike; near the end only the side that is missing does,
    so that the curve does not end in the noise of a single update."""
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        half = min(index, int(len(values) * side))
        after = min(half, len(values) - 1 - index)
        result.append((sums[index + after + 1] - sums[index - half]) / (half + after + 1))
    return result


def mark_refreshes(axes: Axes, steps: list[int]) -> None:
    """Short ticks along the lower edge: where a jump of the curve may come from."""
    axes.plot(
        steps,
        [0.02] * len(steps),
        linestyle="none",
        marker="|",
        markersize=8,
        color="tab:green",
        alpha=0.7,
        transform=axes.get_xaxis_transform(),
        label="subspace refreshed",
    )


def mark_events(axes: Axes, happened: list[tuple[int, str]]) -> None:
    """A thin line through the whole picture for each merge or other event, one colour and label a kind."""
    kinds = dict.fromkeys(kind for _, kind in happened)
    for kind, color in zip(kinds, itertools.cycle(("tab:red", "tab:purple", "tab:brown", "tab:olive")), strict=False):
        for index, step in enumerate(step for step, other in happened if other == kind):
            label = kind if index == 0 else None
            axes.axvline(step, color=color, linestyle=":", linewidth=0.9, alpha=0.8, label=label, zorder=0)


def dress(axes: Axes, title: str, training: list[float], validation: list[float]) -> None:
    """Labels, limits that the first huge losses do not spoil, and nothing that is not needed."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("update")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    shown = [value for value in [*training, *validation] if math.isfinite(value)]
    if shown:
        lowest, highest = min(shown), max(shown)
        room = 0.06 * max(highest - lowest, 0.1)
        axes.set_ylim(lowest - room, highest + room)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
