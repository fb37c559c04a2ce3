"""Models of GLUE: what goes out and comes in again, the head of another task, and what is refused before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lowrank_train.checkpoint import Kind
from lowrank_train.cli import main
from lowrank_train.config.schema import ModelConfig
from lowrank_train.data.glue import TASKS
from lowrank_train.models import build_model
from tests.data.glue_files import write_tokenizer
from tests.glue.conftest import SIZES, WINGS, Run, result_of, roberta, weights_of

KINDS: dict[str, Kind] = {"false": "step", "true": "best"}


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
        capsys.readouterr()
        next_run = run("next", "rte", f"model.path={out}", "optim.lr=1e-9", "trainer.epochs=1")
        said = (next_run / "log.txt").read_text(encoding="utf-8") + "".join(capsys.readouterr())
        assert "classifier.weight is (3, 32), of another task; drawn anew as (2, 32)" in said
        assert main(["train", *words, f"model.path={trained}", "model=hf", "strategy=full", "recipe=null"]) == 2
        assert f"lowrank export run={trained} out=FOLDER" in capsys.readouterr().err
        name = "bert.encoder.layer.1.output.dense.weight"
        torch.testing.assert_close(weights_of(next_run)[name], model.state_dict()[name], rtol=0, atol=1e-6)
        assert weights_of(next_run)["classifier.weight"].shape == (2, 32)


@pytest.mark.parametrize("best", ["false", "true"])
def test_adapters_on_a_decoder_go_out_with_its_head(best: str, run: Run, tmp_path: Path) -> None:
    """Without a word about the head: LLaMA calls it `score`, and PEFT saves it whole beside the adapters."""
    base = write_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0)).save_pretrained(base)
    words = ["strategy=lora", "strategy/inner=adamw", "strategy.select=[*.lora_A,*.lora_B]", "strategy.weights.rank=2",
             "strategy.freeze_rest=true", "optim.lr=1e-2", "trainer.epochs=2"]  # fmt: skip
    trained = run("decoder", "sst2", f"model.path={base}", *words)
    assert "head of the task, trained whole: score" in (trained / "log.txt").read_text(encoding="utf-8")
    out = tmp_path / "adapter"
    assert main(["export", f"run={trained}", f"out={out}", "adapter=true", f"best={best}"]) == 0
    assert "score" in json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["modules_to_save"]
    written, kept = load_file(out / "adapter_model.safetensors"), weights_of(trained, KINDS[best])
    [head] = [tensor for name, tensor in written.items() if "score" in name]
    assert torch.equal(head, kept["score.weight"])


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.seq_len=65"], "data.seq_len=65: is above the 64 positions"),
        (["data.train_rows=0"], "data.train_rows=0: must be at least 1"),
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
