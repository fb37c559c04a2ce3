"""Fine-tuning on GLUE: it learns under every wing, resumes to the bit, keeps its best weights, and can be planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from lowrank_train.checkpoint import checkpoint_folder, checkpoint_folders, checkpoint_step
from lowrank_train.cli import main
from lowrank_train.config.schema import ModelConfig
from lowrank_train.data.glue import TASKS, GlueValidation
from lowrank_train.data.glue.encoding import NO_LABEL, EncodedRows
from lowrank_train.evaluate.heads import CausalHead, GlueHead
from lowrank_train.models import build_model
from tests.glue.conftest import GALORE, SELECT, SIZES, WINGS, Run, result_of, rows_of, weights_of


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_learns_what_a_word_says(
    wing: str, run: Run, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether a sentence ends in one word or another: half of the rows have each label."""
    folder = run(wing, "sst2", *WINGS[wing], "trainer.epochs=8")
    result = result_of(folder)
    assert result["commonest_label_metrics"] == {"validation": {"accuracy": 0.5}}
    assert result["best_metrics"]["validation"]["accuracy"] >= 0.9
    assert result["steps"] == 48 and result["updates_per_epoch"] == 6
    evaluated = [float(row["val/accuracy"]) for row in rows_of(folder) if row["val/accuracy"]]
    assert len(evaluated) == 8
    assert evaluated[-1] == result["metrics"]["validation"]["accuracy"]
    assert max(evaluated) == result["best_metrics"]["validation"]["accuracy"]
    assert result["best_step"] == 6 * (1 + evaluated.index(max(evaluated)))
    trained = result["trainable_parameters"] / result["parameters"]
    assert (trained < 0.2) if wing == "lora" else (trained == 1)
    [best] = checkpoint_folders(folder / "checkpoints", "best")
    assert checkpoint_step(best) == result["best_step"]
    assert main(["evaluate", f"run={folder}", "best=true"]) == 0
    printed = capsys.readouterr().out
    assert f"{folder} after {result['best_step']} updates, the best" in printed
    assert f"accuracy: {max(evaluated):.4f}" in printed
    if wing == "lora":  # frozen means untouched
        before = BertForMaskedLM.from_pretrained(encoder).state_dict()
        after = weights_of(folder)
        for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.weight"):
            assert torch.equal(before[name], after[name])


def test_a_score_is_learnt_and_both_splits_of_mnli_are_evaluated(run: Run) -> None:
    result = result_of(run("stsb", "stsb", "optim.lr=1e-2", "trainer.epochs=2", card=True))
    assert set(result["metrics"]["validation"]) == {"pearson", "spearman"}
    assert result["commonest_label_metrics"] is None and result["best_by"] == ["validation", "pearson"]
    # the scores are 4.25 and 1.5; nothing learnt would be the mean of their squares, 10.2
    assert result["val_loss"] < 5
    folder = run("mnli", "mnli", "trainer.epochs=1", card=True)
    assert list(result_of(folder)["metrics"]) == ["validation_matched", "validation_mismatched"]
    assert {"val/matched/accuracy", "val/mismatched/accuracy"} <= set(rows_of(folder)[0])


def test_it_resumes_to_the_bit(run: Run, tmp_path: Path) -> None:
    """From an update in the middle of an epoch, with dropout, under a subspace that moves."""
    words = [*GALORE, SELECT, "optim.lr=3e-3", "trainer.save_every_steps=5", "trainer.keep_checkpoints=9"]
    whole = run("whole", "mrpc", *words)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    (broken / "result.json").unlink()
    for folder in (broken / "checkpoints").iterdir():
        if folder != checkpoint_folder(broken / "checkpoints", 10) and checkpoint_step(folder) > 5:
            shutil.rmtree(folder)
    assert run("broken", "mrpc", *words) == broken
    assert result_of(broken)["sessions"] == 2
    assert rows_of(broken) == rows_of(whole)
    for kind in ("step", "best"):
        resumed, straight = weights_of(broken, kind), weights_of(whole, kind)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    keys = ("metrics", "best_metrics", "best_step", "val_loss")
    assert [result_of(broken)[key] for key in keys] == [result_of(whole)[key] for key in keys]


def test_micro_batches_of_unequal_length_weigh_every_row_alike(run: Run, encoder: Path, tmp_path: Path) -> None:
    """48 rows in updates of 9: the last of an epoch has 3. Without dropout; sums in another order differ by 1e-6."""
    still = tmp_path / "still"
    shutil.copytree(encoder, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    common = [f"model.path={still}", "strategy=sgd", "optim.lr=0.1", "trainer.epochs=2"]
    one = rows_of(run("one", "qqp", *common, "trainer.batch_size=9"))
    three = rows_of(run("three", "qqp", *common, "trainer.batch_size=3", "trainer.total_batch_size=9"))
    assert len(one) == len(three) == 12
    for a, b in zip(one, three, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), abs=1e-5)
        assert float(a["train/grad_norm"]) == pytest.approx(float(b["train/grad_norm"]), abs=1e-4)


def test_a_decoder_from_scratch(run: Run, encoder: Path) -> None:
    """LLaMA reads the label off the last token that is no pad."""
    sizes = [f"model.{key}={value}" for key, value in SIZES.items() if key != "vocab_size"]
    words = ["model=llama_1m", "model.vocab_size=64", *sizes, f"data.tokenizer={encoder}", "optim.lr=3e-3"]
    result = result_of(run("decoder", "sst2", *words, "model.path=null", "trainer.epochs=8"))
    assert result["best_metrics"]["validation"]["accuracy"] >= 0.9


def test_loss_of_classes_and_of_scores() -> None:
    """Sums over rows with a label; a row that only fills a micro-batch gives no gradient."""

    class Fixed(torch.nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, **_: torch.Tensor) -> Any:
            return self

    ids = torch.zeros(3, 2, dtype=torch.int64)
    logits = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)
    model = Fixed(logits.clone())
    loss, _ = GlueHead(TASKS["mrpc"]).loss(model, {"input_ids": ids, "labels": torch.tensor([1, 0, NO_LABEL])})
    by_hand = -torch.log_softmax(logits, 1)[0, 1] - torch.log_softmax(logits, 1)[1, 0]
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)  # float64, two terms
    loss.backward()
    assert model.logits.grad is not None and not model.logits.grad[2].any()
    scores = Fixed(logits[:, :1].clone())
    labels = torch.tensor([4.0, 0.5, NO_LABEL])
    loss, _ = GlueHead(TASKS["stsb"]).loss(scores, {"input_ids": ids, "labels": labels})
    assert loss.item() == 9.0


def test_few_rows_are_the_first_ones() -> None:
    """Of a task every rank has them all, in the order of the file; of a text each rank has a share of its own."""
    ids = [np.arange(2 + 3 * (row == 0), dtype=np.int32) for row in range(4)]  # the first is the longest
    rows = EncodedRows(ids=ids, types=None, labels=[0.0, 1.0, 1.0, 0.0], pad_id=9, classes=True)
    [batch] = GlueHead(TASKS["mrpc"]).few(GlueValidation({"validation": rows}, 2), 3, ranks=2)
    assert batch["labels"].tolist() == [0, 1, 1] and batch["input_ids"].shape == (3, 5)
    text = [{"input_ids": torch.full((4, 2), n), "labels": torch.full((4, 2), n), "n": n} for n in range(3)]
    for ranks, sizes in ((1, [4, 2]), (2, [3]), (6, [1])):
        found = CausalHead(0).few(text, 6, ranks)
        assert [len(batch["labels"]) for batch in found] == sizes
        assert [int(batch["input_ids"][0, 0]) for batch in found] == list(range(len(sizes)))


def test_it_can_be_planned(encoder: Path, glue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan's weights are those of the model with its head: counted, and not of one that predicts tokens."""
    words = ["recipe=null", "model=hf", f"model.path={encoder}", "data=glue", f"data.folder={glue}", "strategy=full",
             "data.seq_len=40", "data.task=mnli", "format=json"]  # fmt: skip
    assert main(["plan", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    model = build_model(
        ModelConfig(kind="hf", path=str(encoder)), vocab_size=40, dtype=torch.float32, device="cpu", seed=0, outputs=3
    )
    assert found["bytes"]["trained_weights"] == 4 * sum(param.numel() for param in model.parameters())
    assert found["complete"]
