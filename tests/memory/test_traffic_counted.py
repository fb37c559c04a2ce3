"""What is counted on paper is what the optimizer hands to collectives: one process, every tensor counted on its way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_train.config import compose
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.fake_run import optimizer_for
from lowrank_train.memory.plan import counted
from lowrank_train.memory.traffic import messages_of
from lowrank_train.models import build_model, causal_loss
from lowrank_train.optim.ranks import Together
from lowrank_train.strategy import Strategy

PIECES, EVERY = 96, 4
UPDATES = 2 * EVERY  # so that every basis moves twice
WORDS = (
    "recipe=null", "task=plan", "model.hidden_size=64", "model.intermediate_size=176", "model.num_hidden_layers=2",
    f"model.vocab_size={PIECES}", "data.seq_len=16", "trainer.batch_size=1", "trainer.devices=2",
    "trainer.accelerator=cpu", "trainer.strategy=ddp",
)  # fmt: skip
GALORE = ("strategy=galore", "strategy.subspace.rank=16", f"strategy.subspace.every={EVERY}",
          "strategy.subspace.stagger=false")  # fmt: skip
PROJECTED = "trainer.reduce=projected"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one: what is handed over does not depend on how many there are."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def really_sent(config: RunConfig, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes handed over by operation in all updates but the first, which sets every basis up; flags are left out."""
    sent: dict[str, int] = {}

    def counting(name: str) -> Any:
        original = getattr(dist, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.is_floating_point() or name == "broadcast":
                sent[name] = sent.get(name, 0) + tensor.nbytes
            return original(tensor, *args, **kwargs)

        return call

    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, counting(name))
    model = build_model(config.model, vocab_size=PIECES, dtype=torch.float32, device="cpu", seed=0)
    strategy = Strategy.from_config(config.strategy, state_dtype=torch.float32, seed=0)
    strategy.prepare(model)
    optimizer = optimizer_for(config, strategy, model)
    optimizer.ranks = Together("projected" if config.trainer.reduce == "projected" else "gradients")
    rows = torch.randint(PIECES, (1, 16), generator=torch.Generator().manual_seed(0))

    def passes() -> None:
        loss, targets = causal_loss(model, {"input_ids": rows, "labels": rows.clone()}, chunk_tokens=0)
        (loss / targets).backward()

    for update in range(1 + UPDATES):
        if update == 1:
            sent.clear()
        optimizer.zero_grad()
        for _ in range(micro_batches - 1):
            passes()
        optimizer.step(passes)
    return sent


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "words",
    [
        ("strategy=full",),
        GALORE,
        (*GALORE, PROJECTED),
        (*GALORE, "strategy.when=in_backward"),
        (*GALORE, "strategy.when=in_backward", PROJECTED),
        (*GALORE, "strategy.when=project_in_backward"),
        (*GALORE, "strategy.when=project_in_backward", PROJECTED),
        (
            *GALORE,
            "strategy.when=project_in_backward",
            "strategy.basis_under_accumulation=first_micro_batch",
            PROJECTED,
        ),
        ("strategy=fira", *GALORE[1:], PROJECTED),
        ("strategy=grass", *GALORE[1:], PROJECTED),
        ("strategy=ldadam", "strategy.subspace.rank=16", PROJECTED),
        ("strategy=online_subspace", "strategy.subspace.rank=16", PROJECTED),
        ("strategy=lora", "strategy.weights.rank=8"),
    ],
    ids=lambda words: " ".join(word for word in words if word not in GALORE[1:]),
)
def test_payloads(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one micro-batch, and with three where the moment of stepping allows; projected, even where it is refused."""
    for micro_batches in (1,) if "strategy.when=in_backward" in words else (1, 3):
        chosen = [word for word in words if word != PROJECTED]
        config = compose([*WORDS, *chosen, f"trainer.total_batch_size={2 * micro_batches}"])
        config.trainer.reduce = "projected" if PROJECTED in words else "gradients"
        planned: dict[str, float] = {}
        for one in messages_of(config, *counted(config, PIECES)):
            planned[one.collective] = planned.get(one.collective, 0.0) + one.payload_bytes * one.times * UPDATES
        with monkeypatch.context() as patched:
            sent = really_sent(config, micro_batches, patched)
        assert sent == pytest.approx(planned, rel=1e-12)  # whole numbers but for the rounding of thirds and the like
