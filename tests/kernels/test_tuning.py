"""The choice of tiles: measured once, kept in memory and on disk, and made anew where what is kept is of no use."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from lowrank_train.kernels.triton import tuning
from lowrank_train.kernels.triton.tuning import Tiles, chosen, rounded_up

CANDIDATES = [Tiles((128, 64), 8, 3), Tiles((64, 64), 4, 3), Tiles((64, 32), 4, 2)]


class Card:
    """Work on some tensors, and a clock that knows how long each candidate takes."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times, self.measured = dict(zip(CANDIDATES, times, strict=True)), list[Tiles]()
        self.kept = torch.ones(3)
        self.fails: Exception | None = None

    def run(self, tiles: Tiles, changed: Sequence[Tensor]) -> None:
        self.measured.append(tiles)
        changed[0].add_(1)
        if self.fails is not None and tiles == CANDIDATES[1]:
            raise self.fails

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        return self.times[self.measured[-1]]

    def choose(self, bucket: str = "256x512", device: str = "cuda") -> Tiles:
        return chosen("some_kernel", bucket, CANDIDATES, torch.device(device), [self.kept], self.run, self.seconds)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """On a card of a name; choices are kept in a folder that is not there yet."""
    monkeypatch.setenv("LOWRANK_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card 24GB")
    return tmp_path / "cache"


def test_the_quickest_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card([3.0, 1.0, 2.0])
    assert card.choose() == CANDIDATES[1] and card.measured == CANDIDATES
    assert card.choose() == CANDIDATES[1] and len(card.measured) == 3
    assert card.kept.tolist() == [1, 1, 1], "copies are spoilt, and not what is trained"
    monkeypatch.setattr(tuning, "_known", {})  # as in a new process
    other = Card([1.0, 2.0, 3.0])
    assert other.choose() == CANDIDATES[1] and not other.measured
    assert other.choose("512x512") == CANDIDATES[0] and len(other.measured) == 3
    (file,) = cache.iterdir()
    assert file.name.startswith("tiles-some-card-24gb-triton-")
    assert set(json.loads(file.read_text())) == {"some_kernel 256x512", "some_kernel 512x512"}


def test_what_cannot_run_is_passed_over() -> None:
    card = Card([3.0, 1.0, 2.0])
    card.fails = OutOfResources(200_000, 101_376, "shared memory")
    assert card.choose() == CANDIDATES[2]


def test_without_room_the_first_serves_and_nothing_is_kept(cache: Path) -> None:
    card = Card([3.0, 1.0, 2.0])
    card.fails = torch.OutOfMemoryError("no room")
    assert card.choose() == CANDIDATES[0] and not cache.exists()
    card.fails = None
    assert card.choose() == CANDIDATES[1]


def test_several_processes_do_not_choose_each_for_itself(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    card = Card([3.0, 1.0, 2.0])
    assert card.choose() == CANDIDATES[0] and not card.measured and not cache.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"some_kernel 256x512": 3}', '{"some_kernel 256x512": [[7, 7], 1, 1]}'])
def test_a_file_of_no_use_is_replaced(cache: Path, text: str) -> None:
    """Unreadable, or with tiles that are no candidates any more."""
    cache.mkdir()
    tuning.choices_path(torch.device("cuda")).write_text(text)
    assert Card([3.0, 1.0, 2.0]).choose() == CANDIDATES[1]
    (stored,) = (json.loads(file.read_text()) for file in cache.iterdir())
    assert stored["some_kernel 256x512"] == [[64, 64], 4, 3]


def test_a_folder_that_cannot_be_written_to_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWRANK_TRAIN_CACHE", str(tmp_path / "file"))
    card = Card([3.0, 1.0, 2.0])
    assert card.choose() == card.choose() == CANDIDATES[1] and len(card.measured) == 3


def test_off_a_card_the_first_serves() -> None:
    card = Card([3.0, 1.0, 2.0])
    assert card.choose(device="cpu") == CANDIDATES[0] and not card.measured


def test_sizes_share_a_choice_by_powers_of_two() -> None:
    assert [rounded_up(size) for size in (1, 2, 3, 64, 65, 11008)] == [1, 2, 4, 64, 128, 16384]
