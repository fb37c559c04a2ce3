"""torch.compile of the model and of a whole training function: the same losses, and nothing compiled again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lowrank_train.config import compose
from lowrank_train.config.schema import RunConfig
from lowrank_train.evaluate.perplexity import evaluate
from lowrank_train.models import build_model, causal_loss
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.train.run import build_optimizer, prepare_strategy

TINY = ["model=llama_9m", "model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=4"]
TINY += ["model.num_hidden_layers=2", "model.vocab_size=64", "trainer.batch_size=2", "data.seq_len=16", "recipe=null"]
UPDATES, WARM_UP = 6, 2  # bases move at updates 1 and 4; the first evaluation comes after the second
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def config_of(strategy: str, *more: str) -> RunConfig:
    part = "weights" if strategy == "sltrain" else "subspace"
    clock = [] if strategy == "sltrain" else ["strategy.subspace.every=3", "strategy.subspace.stagger=false"]
    return compose([*TINY, f"strategy={strategy}", f"strategy.{part}.rank=4", *clock, *more])


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(64, (2, 16), generator=generator) for _ in range(UPDATES)]
    return [{"input_ids": one, "labels": one} for one in tokens]


def trained(config: RunConfig, on_update: Callable[[], int]) -> tuple[list[float], list[int]]:
    """Losses of all updates and of evaluations after the second and the last; what `on_update` says after each update.

    The passes run inside the optimizer's step, as in a run.
    """
    model = build_model(config.model, vocab_size=64, dtype=torch.float32, device="cpu", seed=0)
    optimizer = build_optimizer(config, prepare_strategy(config, model), model)
    losses, said = [], []

    def passes(batch: dict[str, Tensor]) -> Tensor:
        optimizer.zero_grad()
        total, targets = causal_loss(model, batch, chunk_tokens=config.model.loss_chunk_tokens)
        (total / targets).backward()
        return total.detach() / targets

    for number, batch in enumerate(batches(), start=1):
        losses.append(float(optimizer.step(lambda batch=batch: passes(batch))))
        if number in (WARM_UP, UPDATES):
            chunk = config.model.loss_chunk_tokens
            losses.append(evaluate(model, [batch], chunk_tokens=chunk, device=CPU, autocast=False).loss)
            model.train()
        said.append(on_update())
    return losses, said


@pytest.mark.parametrize("strategy", ["galore", "sltrain"])
def test_compiled_model(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-5 of losses near 4: float32 sums in another order, over six updates.

    aot_eager traces and guards as inductor does, whose C++ takes minutes to compile on a CPU.
    """
    eager, _ = trained(config_of(strategy), lambda: 0)
    counted, compile_module = CompileCounterWithBackend("aot_eager"), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=counted))
    compiled, frames = trained(config_of(strategy, "model.compile=true"), lambda: counted.frame_count)
    assert frames[0] >= 1, "something is compiled inside the optimizer's step"
    assert frames[WARM_UP - 1] == frames[-1], frames
    assert compiled == pytest.approx(eager, abs=1e-5)
    assert len(set(eager)) == len(eager)


def test_compiled_training_function() -> None:
    """The optimizer's step is left out of the graphs: moving bases, counters and codes would be compiled anew."""
    results = []
    counted = CompileCounterWithBackend("aot_eager")
    for compiles in (False, True):
        config = config_of("galore")
        model = build_model(config.model, vocab_size=64, dtype=torch.float32, device="cpu", seed=0)
        optimizer = build_optimizer(config, prepare_strategy(config, model), model)
        step = training_function(model, optimizer)
        call: Any = torch.compile(step, backend=counted) if compiles else step
        losses, frames = [], []
        for batch in batches():
            losses.append(float(call(batch)))
            frames.append(counted.frame_count)
        results.append((losses, frames))
    (eager, _), (compiled, frames) = results
    assert frames[0] >= 1 and frames[0] == frames[-1], frames
    assert compiled == pytest.approx(eager, abs=1e-5)


def training_function(model: nn.Module, optimizer: TransformOptimizer) -> Callable[[dict[str, Tensor]], Tensor]:
    def step(batch: dict[str, Tensor]) -> Tensor:
        total, targets = causal_loss(model, batch, chunk_tokens=0)
        loss = total / targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
