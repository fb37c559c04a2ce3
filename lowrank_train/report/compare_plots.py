"""Pictures of several runs: loss over tokens and over time, perplexity and speed against memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lowrank_train.report.grouping import Group, back_to_front, memory_of, pareto_front
from lowrank_train.report.labels import end_label, place_labels, point_label
from lowrank_train.report.plots import smoothed
from lowrank_train.report.runs import Point, RunRecord

# Okabe and Ito's palette, told apart under every common colour blindness (jfly.uni-koeln.de/color); without its yellow,
# too pale for lines on white. Kinds beyond the seventh take the colours again with another line and mark.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
PALE = 0.28  # runs that are not the best of their kind
GRAY = "#666666"
SETTLED = 0.08  # of a run: what comes before is the steep fall from random weights, which would fill the picture
SIDE = 0.03  # of a run, on either side of an update: its loss is the mean over these, or many curves become a tangle
Draw = Callable[[Axes, list[Group]], None]


def draw_all(groups: list[Group], out: Path) -> list[Path]:
    """One picture of each sort, and compare.png with all four; gives the paths."""
    written = []
    for name, draw in PICTURES.items():
        figure = new_figure(6.4, 4.4)
        draw(figure.add_subplot(), groups)
        written.append(save(figure, out / f"{name}.png"))
    figure = new_figure(12, 8.2)
    for axes, draw in zip(figure.subplots(2, 2).flat, PICTURES.values(), strict=True):
        draw(axes, groups)
    return [*written, save(figure, out / "compare.png")]


def new_figure(width: float, height: float) -> Figure:
    """Without pyplot: no display, no global state."""
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Labels find their places once the axes have theirs; written aside and renamed."""
    canvas = FigureCanvasAgg(figure)  # it measures the labels
    figure.draw_without_rendering()
    for axes in figure.axes:
        place_labels(axes, canvas)
    aside = path.with_name(path.name + ".partial")
    figure.savefig(aside, format="png")
    aside.replace(path)
    return path


def loss_over_tokens(axes: Axes, groups: list[Group]) -> None:
    """Smoothed training loss, with the evaluations as marks."""
    curves(axes, groups, lambda point: point.tokens)
    axes.set_title("Loss over tokens", loc="left", fontsize=11)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def loss_over_time(axes: Axes, groups: list[Group]) -> None:
    """The same over the time of the run, evaluations and saving included."""
    longest = max(run.seconds for group in groups for run in group.runs)
    unit, seconds = ("hours", 3600) if longest >= 2 * 3600 else ("minutes", 60) if longest >= 180 else ("seconds", 1)
    curves(axes, groups, lambda point: point.seconds / seconds)
    axes.set_title("Loss over time", loc="left", fontsize=11)
    axes.set_xlabel(unit)


def perplexity_over_memory(axes: Axes, groups: list[Group]) -> None:
    """With the front of the runs that no other run beats both in memory and in perplexity."""
    what, memory = memory_of([run for group in groups for run in group.runs])
    points = scatter(axes, groups, memory, lambda run: run.perplexity)
    if len(points) > 1:
        draw_front(axes, pareto_front(points))
    axes.set_title("Perplexity against memory", loc="left", fontsize=11)
    axes.set_ylabel("validation perplexity (lower is better)")
    name_memory(axes, what)


def draw_front(axes: Axes, front: list[tuple[float, float]]) -> None:
    """The edge of what the best runs reach: whatever lies right of it and above is beaten."""
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    xs, ys = zip(*front, strict=True)
    axes.step([xs[0], *xs, right], [top, *ys, ys[-1]], where="post", color=GRAY, linewidth=1, linestyle="--", zorder=1,
              label="Pareto front")  # fmt: skip
    axes.set_xlim(right=right)
    axes.set_ylim(top=top)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))


def speed_over_memory(axes: Axes, groups: list[Group]) -> None:
    """Tokens a second, without evaluation and saving."""
    what, memory = memory_of([run for group in groups for run in group.runs])
    points = scatter(axes, groups, memory, lambda run: run.tokens_per_sec)
    axes.set_ylim(0, 1.12 * max([height for _, height in points], default=1))
    axes.set_title("Speed against memory", loc="left", fontsize=11)
    axes.set_ylabel("tokens/s (higher is better)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    name_memory(axes, what)


PICTURES: dict[str, Draw] = {
    "loss_over_tokens": loss_over_tokens,
    "loss_over_time": loss_over_time,
    "perplexity_over_memory": perplexity_over_memory,
    "speed_over_memory": speed_over_memory,
}


def curves(axes: Axes, groups: list[Group], x_of: Callable[[Point], float]) -> None:
    """One colour a kind, its best run strong and named at its end, the others pale."""
    tops, bottoms, furthest = [], [], 0.0
    for index, group, run in back_to_front(groups):
        xs, losses = [x_of(point) for point in run.points], smoothed([point.loss for point in run.points], SIDE)
        best = run is group.best
        color = COLORS[index % len(COLORS)]
        line = LINES[index // len(COLORS) % len(LINES)]
        axes.plot(xs, losses, color=color, linestyle=line, linewidth=1.6 if best else 0.8, alpha=1 if best else PALE)
        measured = [(x_of(point), point.val_loss) for point in run.points if point.val_loss is not None]
        end = measured[-1][1] if measured else losses[-1]
        if best:
            if measured:
                axes.plot(*zip(*measured, strict=True), linestyle="none", marker=mark(index), markersize=5, color=color,
                          markeredgecolor="white", markeredgewidth=0.6, zorder=3, clip_on=False)  # fmt: skip
            end_label(axes, xs[-1], end, f"{group.label} {end:.2f}" + ("" if run.finished else " (unfinished)"), color)
        settled = losses[int(SETTLED * len(losses)) :]
        tops.append(max(settled))
        bottoms += [min(settled), end]
        furthest = max(furthest, xs[-1])
    room = 0.05 * max(max(tops) - min(bottoms), 0.1)
    axes.set_ylim(min(bottoms) - room, max(tops) + room)
    axes.set_xlim(0, furthest)
    axes.set_ylabel("loss, nats per token")
    axes.plot([], [], color=GRAY, linewidth=1.6, label="training, smoothed")
    axes.plot([], [], color=GRAY, linestyle="none", marker="o", markersize=5, label="validation")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    dress(axes)


def scatter(
    axes: Axes,
    groups: list[Group],
    memory: Callable[[RunRecord], int | None],
    value: Callable[[RunRecord], float | None],
) -> list[tuple[float, float]]:
    """A mark a run, hollow where it is not finished; gives their places."""
    points = []
    for index, group, run in back_to_front(groups):
        size, height = memory(run), value(run)
        if size is None or height is None or not math.isfinite(height):
            continue
        best, color = run is group.best, COLORS[index % len(COLORS)]
        x = size / unit_of(groups, memory)[1]
        points.append((x, height))
        axes.scatter([x], [height], s=52 if best else 24, marker=mark(index), alpha=1 if best else PALE, zorder=3,
                     facecolor=color if run.finished else "none", edgecolor=color, linewidth=1.2)  # fmt: skip
        if best:
            text = group.label + ("" if run.finished else " (unfinished)")
            point_label(axes, x, height, text, color)
    axes.margins(0.16)
    axes.set_xlabel(unit_of(groups, memory)[0])
    dress(axes)
    return points


def unit_of(groups: list[Group], memory: Callable[[RunRecord], int | None]) -> tuple[str, float]:
    """MiB for small models, else GiB."""
    largest = max((memory(run) or 0 for group in groups for run in group.runs), default=0)
    return ("MiB", float(1 << 20)) if largest < 1 << 30 else ("GiB", float(1 << 30))


def name_memory(axes: Axes, what: str) -> None:
    axes.set_xlabel(f"{what}, {axes.get_xlabel()}")


def mark(index: int) -> str:
    """Told apart in black and white too."""
    return MARKS[index % len(MARKS)]


def dress(axes: Axes) -> None:
    """Nothing that is not needed."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_minor_formatter(NullFormatter())


def short_count(value: float) -> str:
    """Ticks of tokens: 150k, 2.5M, 13.1B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}"
