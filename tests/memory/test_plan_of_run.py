"""The plan against whole runs: data, Lightning's loop, evaluations, checkpoints and all."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rows import peak_extra_bytes
from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.memory.plan import planned
from tests.train.conftest import without_card

RUN = (
    "recipe=null", "model.hidden_size=192", "model.intermediate_size=512", "model.num_hidden_layers=5",
    "data.seq_len=64", "data.validation_tokens=500", "trainer.batch_size=4", "trainer.accelerator=cpu",
    "trainer.steps=3", "trainer.eval_every_steps=2", "trainer.save_every_steps=2", "generate.max_new_tokens=4",
)  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("strategy=full",),
        ("strategy=fira", "strategy.subspace.rank=32", "precision=bf16_mixed", "trainer.total_batch_size=8"),
        ("strategy=galore", "strategy.subspace.rank=32", "strategy.when=in_backward"),
        ("strategy=relora", "strategy.weights.rank=8", "strategy.merge.every=2"),
        ("strategy=q_galore", "precision=int8", "strategy.subspace.rank=32", "strategy.when=in_backward"),
    ],
    ids=lambda words: words[0],
)
def test_peak_of_a_run_is_the_planned_one(words: tuple[str, ...], tmp_path: Path) -> None:
    """Within 1 %: rows, sums of losses and the workspace of LAPACK come to some tens of kilobytes beside 20 MB.

    The bundled text and its tokenizer: the model has five layers, so its peak is an extrapolated one.
    """
    plan = planned(compose([*RUN, *words, "task=plan"]))
    assert plan.complete, plan.remarks
    run = ["train", *RUN, *words, f"output_dir={tmp_path}"]
    codes: list[int] = []
    with without_card():  # whose plan is the one above
        measured = peak_extra_bytes(lambda: codes.append(main(run)))
    assert codes == [0]
    assert plan.peak_bytes == pytest.approx(measured, rel=0.01)
