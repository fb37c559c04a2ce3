"""Sweeps end with one comparison; a grid of learning rates comes from a recipe; no two jobs share a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_train import cli
from lowrank_train.config import RunConfig, compose, sweeps
from lowrank_train.report import compare

Compared = list[tuple[list[Path], Path]]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RunConfig]:
    """The jobs that a sweep starts, instead of running them; each leaves its folder."""
    seen: list[RunConfig] = []

    def run(words: list[str]) -> int:
        seen.append(compose(words))
        assert seen[-1].run_name is not None
        (Path(seen[-1].output_dir) / seen[-1].run_name).mkdir(parents=True)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "run_apart", run)
    return seen


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Compared:
    """What is handed over for comparison."""
    seen: Compared = []
    monkeypatch.setattr(compare, "compare_sweep", lambda folders, out: seen.append((folders, out)))
    return seen


def test_a_grid_of_learning_rates_for_each_strategy(jobs: list[RunConfig], compared: Compared, tmp_path: Path) -> None:
    assert cli.main(["-m", "recipe=lr_grid", "strategy=full,galore", "output_dir=mine"]) == 0
    tried = {(config.strategy.name, config.optim.lr) for config in jobs}
    assert tried == {(name, lr) for name in ("full", "galore") for lr in (1e-3, 3e-3, 1e-2)}
    [(folders, out)] = compared
    assert len(set(folders)) == len(jobs) == 6
    assert all(folder.is_dir() and folder.parent == Path("mine") for folder in folders)
    assert out.parent == Path("runs/sweeps") and (tmp_path / out / "multirun.yaml").is_file()


def test_rates_on_the_command_line_take_the_place_of_the_grid(jobs: list[RunConfig], compared: Compared) -> None:
    assert cli.main(["-m", "recipe=lr_grid", "optim.lr=0.2,0.5"]) == 0
    assert [config.optim.lr for config in jobs] == [0.2, 0.5]
    assert len(compared) == 1


def test_a_grid_is_checked_before_it_starts(
    jobs: list[RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps, "grid_of", lambda recipe: {"optim.lr": "1e-3,fast", "optim.lrr": "1"})
    assert cli.main(["-m", "recipe=lr_grid"]) == 2
    errors = capsys.readouterr().err
    assert "optim.lr=fast" in errors and "Did you mean optim.lr?" in errors and not jobs


def test_values_that_differ_in_signs_alone_have_folders_of_their_own(jobs: list[RunConfig], compared: Compared) -> None:
    assert cli.main(["-m", "generate.prompt='a b','a/b'", "seed=1"]) == 0
    names = [config.run_name for config in jobs]
    assert len(set(names)) == 2 and names[1] == f"{names[0]}.2"


def test_other_verbs_and_jobs_that_never_began_are_not_compared(
    jobs: list[RunConfig], compared: Compared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "run_apart", lambda words: 0)
    assert cli.main(["explain", "-m", "strategy=full,galore"]) == 0
    assert compared == []
    monkeypatch.undo()
    capsys.readouterr()
    compare.compare_sweep([Path("nowhere")], Path("out"))
    assert capsys.readouterr().out == "" and not Path("out").exists()
