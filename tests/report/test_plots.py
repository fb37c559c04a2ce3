"""The picture of a run: every element that the numbers call for is there, and it is a picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from lowrank_train.report.plots import plot_loss, smoothed

COLUMNS = ["step", "train/loss", "val/loss", "optim/refreshes"]


def metrics(folder: Path, steps: int) -> Path:
    path = folder / "metrics.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for step in range(1, steps + 1):
            loss = 4.5 + 3.2 * math.exp(-step / 150) + 0.15 * math.sin(step * 12.9898) * math.cos(step * 78.2)
            writer.writerow({
                "step": step,
                "train/loss": loss,
                "val/loss": 4.55 + 3.2 * math.exp(-step / 150) if step % 250 == 0 else "",
                "optim/refreshes": 14 if step % 200 == 1 else 0,
            })  # fmt: skip
    return path


@pytest.mark.parametrize("steps", [0, 1, 1500])
def test_a_picture_of_any_length(tmp_path: Path, steps: int) -> None:
    picture = tmp_path / "loss.png"
    plot_loss(metrics(tmp_path, steps), picture, title="llama_1m · galore · shakespeare", unigram_perplexity=570.0)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert not (tmp_path / "loss.png.partial").exists()


def test_what_there_is_moves_the_picture(tmp_path: Path) -> None:
    path = metrics(tmp_path, 300)
    pictures = []
    for number, unigram in enumerate((None, 570.0)):
        plot_loss(path, tmp_path / f"{number}.png", title="t", unigram_perplexity=unigram)
        pictures.append((tmp_path / f"{number}.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_smoothing_keeps_lines_and_removes_noise_without_lag() -> None:
    line = [10 - 0.01 * step for step in range(400)]
    assert smoothed(line)[:-4] == pytest.approx(line[:-4])
    assert smoothed(line)[-1] == pytest.approx(line[-3]), "the last value is the mean of itself and the four before"
    noisy = smoothed([4.0 + (-1) ** step for step in range(1000)])
    assert max(abs(value - 4.0) for value in noisy[20:-20]) < 0.1
    assert smoothed([5.0, 1.0]) == [5.0, 1.0]
    assert smoothed([]) == []
