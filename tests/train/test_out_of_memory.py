"""A run that dies of memory says in which phase, what was held and what needs less, and keeps its last checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.checkpoint import newest_complete
from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.config.errors import EXIT_OUT_OF_MEMORY
from lowrank_train.evaluate import heads
from lowrank_train.memory import out_of_memory
from lowrank_train.memory.cards import Card
from lowrank_train.memory.fitting import Search
from lowrank_train.memory.out_of_memory import is_out_of_memory
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.subspace.randomized import Randomized
from lowrank_train.train import checkpoint_io, run, summary

Words = Callable[..., list[str]]
IN_BACKWARD = ("strategy.when=in_backward", "optim.grad_clip=null")
RELORA = ("strategy=relora", "strategy.weights.rank=4", "strategy.merge.every=6", "optim.cycle_steps=null")

# what is made to fail, the words of the run, the phase that is to be named
CASES: dict[str, tuple[Any, str, tuple[str, ...], str]] = {
    "forward": (heads, "causal_loss", (), "forward"),
    "backward": (heads, "causal_loss", (), "backward"),
    "step": (TransformOptimizer, "_update", (), "step"),
    "step in backward": (TransformOptimizer, "_update", IN_BACKWARD, "backward"),
    "bases": (Randomized, "move", (), "moving bases"),
    "bases in backward": (Randomized, "move", IN_BACKWARD, "moving bases"),
    "evaluation": (heads, "evaluate", (), "evaluation"),
    "checkpoint": (checkpoint_io, "save_checkpoint_folder", (), "checkpoint"),
    "event": (LoRALinear, "fold_", RELORA, "event"),
    "summary": (summary, "sampled_paragraph", (), "summary"),
}


def not_enough() -> BaseException:
    """A new one each time: an exception that is raised again keeps its old traceback."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, checkpoints: Path, *, backward: bool) -> None:
    """Let the first call fail that comes when a checkpoint is complete; the planner may then use what failed."""
    real = getattr(owner, name)
    died: list[bool] = []

    def failing(tensor: Tensor) -> None:
        raise not_enough()

    def wrapped(*args: Any, **settings: Any) -> Any:
        if died or newest_complete(checkpoints)[0] is None:
            return real(*args, **settings)
        died.append(True)
        if not backward:
            raise not_enough()
        loss, targets = real(*args, **settings)
        loss.register_hook(failing)
        return loss, targets

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("case", CASES)
def test_phase_breakdown_and_changes(
    case: str,
    tiny: Words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name, words, phase = CASES[case]
    if case != "forward":  # the search is the same for all
        monkeypatch.setattr(out_of_memory, "suggestions", lambda *_: ["What needs less"])
    fail_once(monkeypatch, owner, name, tmp_path / "r" / "checkpoints", backward=case == "backward")
    assert main(tiny("r", "rehearse=false", "trainer.total_batch_size=8", *more(words))) == EXIT_OUT_OF_MEMORY
    err = capsys.readouterr().err
    kept, _ = newest_complete(tmp_path / "r" / "checkpoints")
    assert kept is not None
    step = int(kept.name.removeprefix("step_"))
    head, last, held, *rest = err[err.index("out of memory (") :].splitlines()
    done = re.fullmatch(
        rf"out of memory \({phase}, after (\d+) updates\): CUDA out of memory\. Tried to allocate 20\.00 GiB\.", head
    )
    assert done and int(done[1]) >= step
    assert last == f"The last checkpoint is of step {step:,}; it is kept."
    assert held.startswith("Held on ") and "weights" in held and "state: exp_avg" in held and "the rest" in held
    if case != "forward":
        return
    assert rest[0].startswith("The plan has a peak of ") and len(rest) == 5
    assert all(re.match(r"  \S+=.*: \d+\.\d\d [GM]B less; ", line) for line in rest[1:4])


def more(words: tuple[str, ...]) -> tuple[str, ...]:
    """in_backward takes no accumulation."""
    return (*words, "trainer.batch_size=8") if "strategy.when=in_backward" in words else words


def test_the_run_goes_on_from_what_was_kept(
    tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, TransformOptimizer, "_update", tmp_path / "r" / "checkpoints", backward=False)
    words = tiny("r", "rehearse=false", "trainer.steps=6")
    monkeypatch.setattr(out_of_memory, "suggestions", lambda *_: [])
    assert main(words) == EXIT_OUT_OF_MEMORY
    assert main(words) == 0
    assert "going on after step 3" in capsys.readouterr().out + (tmp_path / "r" / "log.txt").read_text()


def test_a_model_that_cannot_be_built(
    tiny: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(run, "build_model", failing)
    assert main(tiny("r")) == EXIT_OUT_OF_MEMORY
    err = capsys.readouterr().err
    assert "out of memory (building model and optimizer): MemoryError\nThe plan has a peak of " in err
    assert "Held on" not in err


def test_changes_are_said_where_they_cannot_be_planned(
    tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr("lowrank_train.memory.fitting.planned", failing)
    fail_once(monkeypatch, heads, "causal_loss", tmp_path / "r" / "checkpoints", backward=False)
    assert main(tiny("r", "rehearse=false")) == EXIT_OUT_OF_MEMORY
    err = capsys.readouterr().err
    assert "could not be planned by how much: no plan" in err and "  model.activation_checkpointing=true: " in err


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80000000000 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("the table is out of memory banks"), False),
    ],
)
def test_what_is_out_of_memory(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_savings_are_differences_of_two_plans(tiny: Words) -> None:
    config = compose(tiny("r", "trainer.total_batch_size=8"))
    search = Search(config, Card("all", 10**9, None))
    first = search.savings(3)[0]
    assert first.words == {"trainer.batch_size": "2"}
    alone = Search(compose(tiny("r", "trainer.total_batch_size=8", "trainer.batch_size=2")), Card("all", 10**9, None))
    assert first.needed_bytes == alone.found.as_it_is.needed_bytes
    assert first.saved_bytes == search.found.as_it_is.needed_bytes - first.needed_bytes > 0
