"""`lowrank support` tells what is so: the pages are its own, what it refuses is refused, and what it allows runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

import lowrank_train.train.run  # noqa: F401  what `train` imports is not what is timed
from benchmarks import support_page
from lowrank_train import support
from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.config.paths import group_choices
from lowrank_train.config.schema import RunConfig
from lowrank_train.support import MOMENTS, PARALLELISMS, STORAGES, Cell, cells
from lowrank_train.support_table import Notes, grouped, rows, table
from tests.train import zero_ranks
from tests.two_processes import RANKS, on_two

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE_SEC = 2.0  # of this process's time
UNDER_STAGE_1 = ("full", "lion", "lora", "sltrain")


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    """What the command composes, by strategy; it takes longer than to put all combinations to the checks."""
    return {}


@pytest.fixture(scope="module")
def found(configs: dict[str, RunConfig]) -> list[Cell]:
    def kept(words: Sequence[str]) -> RunConfig:
        config = compose(words)
        configs[config.strategy.name] = config
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "compose", kept)
        return support_page.found()


def test_every_combination_is_there(found: Sequence[Cell]) -> None:
    expected = len(group_choices()["strategy"]) * len(PARALLELISMS) * len(MOMENTS) * len(STORAGES)
    assert len({(cell.strategy, cell.parallelism, cell.moment, cell.storage) for cell in found}) == expected


def test_pages_are_what_the_command_finds(found: Sequence[Cell]) -> None:
    """`make docs` writes both."""
    assert support_page.PAGE.read_text(encoding="utf-8") == support_page.page(found)
    readme = support_page.README.read_text(encoding="utf-8")
    assert readme.partition(support_page.BEGINS)[2].partition(support_page.ENDS)[0] == support_page.block(found)


def test_known_answers(found: Sequence[Cell]) -> None:
    runs = {(cell.strategy, cell.parallelism, cell.moment, cell.storage) for cell in found if cell.reason is None}
    assert {("galore", "one", moment, "q4") for moment in MOMENTS} <= runs
    assert ("galore", "ddp_projected", "in_backward", "fp32") in runs
    assert ("fira", "one", "project_in_backward", "fp32") not in runs  # its lift needs the whole gradient
    assert ("fira", "ddp_projected", "after_backward", "fp32") not in runs
    assert ("galore", "fsdp", "after_backward", "fp32") in runs
    assert {("full", "zero1"), ("lora", "zero2"), ("lora", "zero3")} <= {cell[:2] for cell in runs}
    zero = {cell for cell in runs if cell[1].startswith("zero")}
    assert not {cell for cell in zero if cell[0] in ("galore", "muon", "adafactor", "relora", "sst")}
    assert not {cell for cell in zero if cell[2] != "after_backward" or cell[3] != "fp32"}


def words_of(cell: Cell) -> list[str]:
    """The command line that asks for a combination."""
    trainer = [f"trainer.{key}={value}" for key, value in PARALLELISMS[cell.parallelism].items()]
    storage = [] if cell.storage == "fp32" else [f"strategy/storage={cell.storage}"]
    storage = ["precision=int8"] if cell.storage == "int8" else storage
    words = [f"strategy={cell.strategy}", "recipe=null", "model=llama_60m", f"strategy.when={cell.moment}"]
    return [*words, *trainer, *storage]


def test_what_it_calls_refused_stops_at_once_with_the_reason(
    found: Sequence[Cell],
    configs: Mapping[str, RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One combination for each reason: all others with it go through the same check."""
    monkeypatch.chdir(tmp_path)
    notes, one_of = Notes(), dict[int, Cell]()
    stored = {name for name, config in configs.items() if config.strategy.storage}
    for cell in found:
        if cell.reason is not None and cell.strategy not in stored:  # the words would have to take their storage away
            one_of.setdefault(notes.number(cell), cell)
    assert len(one_of) > 20
    for cell in one_of.values():
        assert cell.reason is not None
        began_sec = time.process_time()
        code = main(["train", *words_of(cell)])
        took_sec = time.process_time() - began_sec
        said = capsys.readouterr().err
        assert code == 2 and cell.reason in said, f"{cell}\n{said}"
        assert took_sec < AT_ONCE_SEC, f"{cell} took {took_sec:.1f} s"
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_a_fresh_process_refuses_too() -> None:
    words = ["strategy=galore", "trainer=deepspeed_zero2"]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert "hands the optimizer flat pieces of many tensors, and strategy galore has strategy.subspace" in done.stderr


def test_command_prints_a_line_and_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support", "strategy=lora"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["strategy", *PARALLELISMS, "state"]
    assert printed[1].split()[:3] == ["lora", "ai", "1"]
    assert any(
        line.startswith("  1  strategy.when=project_in_backward: strategy NAME has no subspace") for line in printed
    )


def test_command_prints_everything_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support", "strategy=badam", "format=json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed) == len(PARALLELISMS) * len(MOMENTS) * len(STORAGES)
    assert all(cell["runs"] == (cell["reason"] is None) for cell in printed)


def test_words_of_the_run_count() -> None:
    """A norm to clip by is not known inside the backward pass."""
    config = compose(["strategy=lora", "recipe=null", "optim.grad_clip=1.0", "task=plan"])
    one = {cell.moment: cell.reason for cell in cells(config, "lora", ("fp32",)) if cell.parallelism == "one"}
    assert one["after_backward"] is None and "optim.grad_clip=1.0" in str(one["in_backward"])


def test_reasons_that_differ_only_in_names_share_a_number() -> None:
    first = Cell("a", "zero1", "after_backward", "fp32", "trainer.strategy=deepspeed_zero1: strategy a does (x)")
    second = Cell("b", "zero2", "after_backward", "fp32", "trainer.strategy=deepspeed_zero2: strategy b does (y, z)")
    other = Cell("b", "zero2", "in_backward", "fp32", "something else")
    notes = Notes()
    assert [notes.number(cell) for cell in (first, second, other)] == [1, 1, 2]


def test_strategies_that_run_alike_share_a_line() -> None:
    def all_of(name: str, runs: bool) -> list[Cell]:
        return [
            Cell(name, way, moment, storage, None if runs or way == "one" else f"not {way}")
            for way in PARALLELISMS
            for moment in MOMENTS
            for storage in STORAGES
        ]

    cells = [*all_of("x", True), *all_of("y", False), *all_of("z", True)]
    everywhere = ("api",) * len(PARALLELISMS)
    assert grouped(cells) == {
        (*everywhere, "bf16 q8 q4 int8"): ["x", "z"],
        ("api", *["-"] * (len(PARALLELISMS) - 1), "bf16 q8 q4 int8"): ["y"],
    }
    assert rows(cells, Notes())["y"][1] == "- 1"
    assert len(list(table(cells))) > 4


def test_every_strategy_that_zero_takes_is_on_two_processes_what_it_is_on_one(
    found: Sequence[Cell], configs: Mapping[str, RunConfig], tmp_path: Path
) -> None:
    """Weights and state after three updates of two micro-batches, clipped; and going on from a save is exact.

    All under stages 2 and 3. Stage 1 hands our optimizer the same pieces as 2, and gathers gradients elsewhere,
    whatever they are of: some strategies, of dense weights, of factors, and of factors with sparse entries.
    """
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    taken = {
        stage: [cell.strategy for cell in found if cell.parallelism == f"zero{stage}" and cell.reason is None]
        for stage in (1, 2, 3)
    }
    assert taken[1] == taken[2] == taken[3]
    wanted = [(stage, name) for stage in taken for name in taken[stage] if stage > 1 or name in UNDER_STAGE_1]
    cases = [(stage, asdict(configs[name].strategy)) for stage, name in wanted]
    on_two(zero_ranks.main, cases, tmp_path, folder=tmp_path)
    for rank in range(RANKS):
        said_of_all = json.loads((tmp_path / f"found{rank}.json").read_text(encoding="utf-8"))
        results = {(said["stage"], said["name"]): said for said in said_of_all}
        assert list(results) == wanted and wanted
        for name, said in results.items():
            assert said["difference"] < 2e-6, name  # float32, in sums of another order
            assert said["moved"] and said["resumed"], name
