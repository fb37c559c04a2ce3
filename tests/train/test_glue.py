"""Fine-tuning on GLUE: it learns under every wing, resumes to the bit, exports, and refuses what cannot work."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, RobertaConfig, RobertaModel

from lowrank_train.checkpoint import checkpoint_folder, load_weights, newest_complete, read_manifest
from lowrank_train.cli import main
from lowrank_train.config.schema import ModelConfig
from lowrank_train.data.glue import TASKS
from lowrank_train.data.glue.encoding import NO_LABEL
from lowrank_train.evaluate.heads import GlueHead
from lowrank_train.models import build_model
from tests.data.glue_files import write_glue, write_tokenizer
from tests.train.conftest import WALL_CLOCK_COLUMNS

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GALORE = ["strategy=galore", "strategy.subspace.rank=4", "strategy.subspace.every=10", "strategy.lift.scale=1"]
SELECT = "strategy.select=[*.attention.self.*.weight,*.intermediate.dense.weight,*.output.dense.weight]"
WINGS = {
    "full": ["strategy=full", "optim.lr=1e-2"],
    "galore": [*GALORE, SELECT, "optim.lr=1e-2"],
    "lora": [
        "strategy=lora", "strategy/inner=adamw", "strategy.weights.modules=[*.query,*.value]",
        "strategy.weights.rank=4",
        "strategy.select=[*.lora_A,*.lora_B,classifier.*,bert.pooler.*]", "strategy.freeze_rest=true", "optim.lr=8e-3",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), train=48, validation=20)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 30 thousand parameters with dropout, as it leaves masked pre-training, and its tokenizer."""
    folder = write_tokenizer(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, initializer_range=0.15)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


Run = Callable[..., Path]


@pytest.fixture
def run(glue: Path, encoder: Path, tmp_path: Path) -> Run:
    """Train in this process on task `name`; checks the exit code and gives the run folder."""

    def call(name: str, task: str, *more: str, code: int = 0) -> Path:
        given = {word.partition("=")[0] for word in more}
        words = [
            "recipe=null", "model=hf", f"model.path={encoder}", "data=glue", f"data.task={task}", f"data.folder={glue}",
            "data.seq_len=40", "trainer.batch_size=8", "trainer.epochs=4", "trainer.accelerator=cpu", "seed=1",
            "optim=linear", "strategy=full", f"output_dir={tmp_path}", f"run_name={name}",
        ]  # fmt: skip
        kept = [word for word in words if word.partition("=")[0] not in given]
        assert main([*kept, *more]) == code
        return tmp_path / name

    return call


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in WALL_CLOCK_COLUMNS} for row in csv.DictReader(file)]


def weights_of(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    checkpoint = newest_complete(folder / "checkpoints")[0] if step is None else None
    checkpoint = checkpoint or checkpoint_folder(folder / "checkpoints", step or 0)
    return load_weights(checkpoint, read_manifest(checkpoint))


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_learns_what_a_word_says(wing: str, run: Run, encoder: Path) -> None:
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
    if wing == "lora":  # frozen means untouched
        before = BertForMaskedLM.from_pretrained(encoder).state_dict()
        after = weights_of(folder)
        for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.weight"):
            assert torch.equal(before[name], after[name])


def test_a_score_is_learnt_and_both_splits_of_mnli_are_evaluated(run: Run) -> None:
    result = result_of(run("stsb", "stsb", "optim.lr=1e-2", "trainer.epochs=2"))
    assert set(result["metrics"]["validation"]) == {"pearson", "spearman"}
    assert result["commonest_label_metrics"] is None and result["best_by"] == ["validation", "pearson"]
    # the scores are 4.25 and 1.5; nothing learnt would be the mean of their squares, 10.2
    assert result["val_loss"] < 5
    folder = run("mnli", "mnli", "trainer.epochs=1")
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
        if folder != checkpoint_folder(broken / "checkpoints", 10):
            shutil.rmtree(folder)
    assert run("broken", "mrpc", *words) == broken
    assert result_of(broken)["sessions"] == 2
    assert rows_of(broken) == rows_of(whole)
    resumed, straight = weights_of(broken), weights_of(whole)
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


@pytest.mark.parametrize("wing", ["full", "lora"])
def test_export_loads_and_a_task_of_other_labels_starts_from_it(
    wing: str, run: Run, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run("trained", "mnli", *WINGS[wing], "trainer.epochs=1")
    out = tmp_path / "hub"
    assert main(["export", f"run={trained}", f"out={out}"]) == 0
    assert "AutoModelForSequenceClassification" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == dict(enumerate(TASKS["mnli"].labels))
    assert main(["evaluate", f"run={trained}"]) == 0
    printed, result = capsys.readouterr().out, result_of(trained)
    assert f"matched/accuracy: {result['metrics']['validation_matched']['accuracy']:.4f}" in printed
    words = ["data=glue", "data.task=mnli", f"data.folder={glue}", "data.seq_len=40", f"data.tokenizer={out}"]
    assert main(["evaluate", f"run={out}", *words]) == 0
    assert f"matched/accuracy: {result['metrics']['validation_matched']['accuracy']:.4f}" in capsys.readouterr().out
    if wing == "full":
        assert main(["evaluate", f"run={out}", *words, "data.task=rte"]) == 2
        next_run = run("next", "rte", f"model.path={out}", "optim.lr=1e-9", "trainer.epochs=1")
        name = "bert.encoder.layer.1.output.dense.weight"
        torch.testing.assert_close(weights_of(next_run)[name], model.state_dict()[name], rtol=0, atol=1e-6)
        assert weights_of(next_run)["classifier.weight"].shape == (2, 32)


def test_a_new_head_depends_on_the_seed_alone(encoder: Path) -> None:
    settings = ModelConfig(kind="hf", path=str(encoder))

    def build(seed: int, draws: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(draws)
        model = build_model(settings, vocab_size=40, dtype=torch.float32, device="cpu", seed=seed, outputs=3)
        return model.state_dict()

    first, same, other = build(1, 5), build(1, 6), build(2, 5)
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {"classifier.weight", "bert.pooler.dense.weight"}
    # N(0, 0.15^2), the folder's own: the deviation of 96 numbers is within 30 % of it
    assert 0.105 < float(first["classifier.weight"].std()) < 0.195


def roberta(folder: Path) -> Path:
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=42, pad_token_id=1)).save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.seq_len=65"], "data.seq_len=65: is above the 64 positions"),
        (["data.folder=/nowhere"], "data.folder=/nowhere: there is no such folder"),
        (["data.packing=pad"], "data.packing=pad: means nothing with data.source=glue"),
        (["data.repeat=false"], "data.repeat=false: means nothing"),
        (["rehearse=true"], "rehearse=true: is for long runs on text"),
        (["data.task=mnlii"], "must be one of cola | sst2 | mrpc"),
        (["data.task=null"], "data.task: data=glue needs the task"),
        (["optim.warmup_steps=99"], "is above the 24 updates of trainer.epochs=4"),
        (["optim.warmup_steps=9", "optim.warmup_ratio=0.1"], "give one of them"),
        (["trainer.epochs=null", "optim.warmup_ratio=0.1"], "give trainer.epochs"),
        (
            ["data=shakespeare", "data.task=null", "data.folder=null"],
            "trainer.epochs=4: means something with data=glue",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    words: list[str], told: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("refused", "mrpc", *words, code=2)
    assert told in capsys.readouterr().err
    assert not (folder / "metrics.csv").exists()


def test_models_and_files_that_do_not_fit_are_refused(
    run: Run, encoder: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(encoder, cut)
    config = json.loads((cut / "config.json").read_text()) | {"num_hidden_layers": 3}
    (cut / "config.json").write_text(json.dumps(config))
    run("a", "mrpc", f"model.path={cut}", code=2)
    assert "bert.encoder.layer.2." in capsys.readouterr().err
    run("b", "mrpc", f"model.path={roberta(tmp_path / 'roberta')}", code=2)
    assert "counts positions by its own pad id 1" in capsys.readouterr().err
    run("c", "mrpc", f"model.path={tmp_path / 'roberta'}", "data.seq_len=41", code=2)
    assert "is above the 40 positions" in capsys.readouterr().err, "RoBERTa's first position is 2"
    no_pad = tmp_path / "no_pad"
    shutil.copytree(encoder, no_pad)
    write_tokenizer(no_pad, pad=False)
    run("d", "mrpc", f"model.path={no_pad}", code=2)
    assert "has no pad token" in capsys.readouterr().err
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", encoding="utf-8")
    run("e", "rte", f"data.train=[{wrong}]", code=2)
    assert f"{wrong}, line 2: label='maybe': is no label of RTE" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/metrics.csv"))


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
