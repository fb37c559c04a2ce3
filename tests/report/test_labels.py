"""Names beside curves and points: none covers another, and none strays further than it must."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from lowrank_train.report.compare_plots import draw_all, loss_over_tokens, new_figure, perplexity_over_memory
from lowrank_train.report.grouping import grouped
from lowrank_train.report.labels import kept_apart, place_labels
from lowrank_train.report.runs import read_run
from tests.report.conftest import MakeRun, result_of


@pytest.mark.parametrize(
    "wished, kept",
    [
        ([], []),
        ([3.0], [3.0]),
        ([0.0, 10.0], [0.0, 10.0]),
        ([5.0, 5.0], [4.0, 6.0]),
        ([5.0, 6.0, 20.0], [4.5, 6.5, 20.0]),
        ([1.0, 2.0, 3.5, 3.6], [-0.475, 1.525, 3.525, 5.525]),
    ],
)
def test_positions_move_no_more_than_they_must(wished: list[float], kept: list[float]) -> None:
    assert kept_apart(wished, 2.0) == pytest.approx(kept)


@pytest.mark.parametrize("draw", [loss_over_tokens, perplexity_over_memory])
def test_no_name_covers_another(draw: object, make_run: MakeRun) -> None:
    """Nine kinds that end within a hair of each other, more than there are colours."""
    names = ("full", "galore", "fira", "apollo", "lion", "flora", "grass", "ldadam", "sgd")
    runs = [
        read_run(make_run(name, f"strategy={name}", val_perplexity=50 + 0.01 * n,
                          planned={**result_of()["planned"], "peak_bytes": (40 << 20) + 1000 * n}))
        for n, name in enumerate(names)
    ]  # fmt: skip
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    draw(axes, grouped(runs))  # type: ignore[operator]
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    place_labels(axes, canvas)
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]  # without the ties
    assert len(boxes) == len(names)
    if draw is loss_over_tokens:
        overlaps = [min(a.y1, b.y1) - max(a.y0, b.y0) for a, b in itertools.combinations(boxes, 2)]
        assert max(overlaps) < 0.5, "of a pixel"
    else:
        assert sum(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)) <= 3, "eight places for nine names"


def test_pictures_of_one_run_of_one_update(make_run: MakeRun, tmp_path: Path) -> None:
    for path in draw_all(grouped([read_run(make_run("begun", steps_done=1))]), tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
