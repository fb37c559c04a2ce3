"""Names written beside curves and points in place of a legend, moved so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

EDGE = 1.03  # where names of curves begin, as a share of the width of the axes
END, POINT = "end", "point"
AROUND = (  # offset from a point in points of type, and which side of the name is there
    ((7, 5), "left", "bottom"), ((7, -5), "left", "top"), ((-7, 5), "right", "bottom"), ((-7, -5), "right", "top"),
    ((0, 8), "center", "bottom"), ((0, -8), "center", "top"),
    ((10, 0), "left", "center"), ((-10, 0), "right", "center"),
)  # fmt: skip
OUTSIDE = 3  # a place outside the axes is as bad as covering so many names


def end_label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """A name beside the right edge, tied to the end of its curve."""
    axes.annotate(
        text, (x, y), xytext=(EDGE, y), textcoords=axes.get_yaxis_transform(), color=color, fontsize=9, va="center",
        annotation_clip=False, gid=END,
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
    )  # fmt: skip


def point_label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """A name beside a point, legible on a line."""
    name = axes.annotate(text, (x, y), xytext=(7, 5), textcoords="offset points", color=color, fontsize=9, gid=POINT)
    name.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def place_labels(axes: Axes, canvas: FigureCanvasAgg) -> None:
    """Move the names that lie on one another, once the axes have their place in the picture."""
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    _place_ends(axes, canvas, sorted((name for name in names if name.get_gid() == END), key=lambda name: name.xy[1]))
    _place_points(
        axes, canvas, sorted((name for name in names if name.get_gid() == POINT), key=lambda name: -name.xy[1])
    )


def _place_ends(axes: Axes, canvas: FigureCanvasAgg, names: list[Annotation]) -> None:
    if not names:
        return
    heights = [float(axes.transData.transform((0.0, name.xy[1]))[1]) for name in names]
    line = Text.get_window_extent(names[0], canvas.get_renderer()).height  # without the line that ties it to its curve
    for name, height in zip(names, kept_apart(heights, line), strict=True):
        name.xyann = (EDGE, float(axes.transData.inverted().transform((0.0, height))[1]))


def _place_points(axes: Axes, canvas: FigureCanvasAgg, names: list[Annotation]) -> None:
    places = [axes.transData.transform(name.xy) for name in names]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    for name in names:
        tried = []
        for offset, side, level in AROUND:
            box = _put(name, canvas, offset, side, level)
            is_inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            is_inside = is_inside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            tried.append(sum(box.overlaps(other) for other in taken) + OUTSIDE * (not is_inside))
        taken.append(_put(name, canvas, *AROUND[tried.index(min(tried))]))


def _put(name: Annotation, canvas: FigureCanvasAgg, offset: tuple[float, float], side: str, level: str) -> Bbox:
    name.set(ha=side, va=level)
    name.xyann = offset
    return name.get_window_extent(canvas.get_renderer())


def kept_apart(positions: Sequence[float], least: float) -> list[float]:
    """The sorted positions, moved as little as need be so that neighbours are at least `least` apart.

    Those that would touch form a block around the mean of their wishes; blocks that meet become one.
    """
    blocks: list[list[float]] = []
    for position in positions:
        blocks.append([position])
        while len(blocks) > 1 and _touch(blocks[-2], blocks[-1], least):
            last = blocks.pop()
            blocks[-1] += last
    return [_mean(block) + (index - (len(block) - 1) / 2) * least for block in blocks for index in range(len(block))]


def _touch(lower: Sequence[float], upper: Sequence[float], least: float) -> bool:
    return _mean(upper) - _mean(lower) < least * (len(lower) + len(upper)) / 2


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
