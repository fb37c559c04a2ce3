"""Fine-tuning on chats: it learns, resumes to the bit, answers, exports with its template, and refuses bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowrank_train.checkpoint import checkpoint_folder
from lowrank_train.cli import main
from tests.data.chat_files import sums, turns, write_letters, write_rows
from tests.train.conftest import assert_same_run, rows_of, without_card

Run = Callable[..., Path]
EPOCHS = 8
GALORE = ["strategy=galore", "strategy.subspace.rank=4", "strategy.subspace.every=3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 30 thousand parameters that knows nothing, its tokenizer with a chat template, and two files."""
    folder = tmp_path_factory.mktemp("base")
    write_letters(folder / "model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=160)
    ).save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", sums(0, 40))
    write_rows(folder / "validation.jsonl", sums(40, 8))
    return folder


def words(base: Path, out: Path, name: str, *more: str) -> list[str]:
    given = {word.partition("=")[0] for word in more}
    usual = [
        "recipe=null", "model=hf", f"model.path={base}/model", "data=chat", f"data.train=[{base}/train.jsonl]",
        f"data.validation=[{base}/validation.jsonl]", "data.seq_len=128", "data.sample_tokens=24", "strategy=full",
        "optim.lr=1e-2", f"trainer.epochs={EPOCHS}", "trainer.batch_size=4", "trainer.accelerator=cpu", "seed=1",
        f"output_dir={out}", f"run_name={name}",
    ]  # fmt: skip
    return [*(word for word in usual if word.partition("=")[0] not in given), *more]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped, with a checkpoint in the middle of its second epoch."""
    out = tmp_path_factory.mktemp("runs")
    more = [*GALORE, "trainer.save_every_steps=7", "trainer.keep_checkpoints=9", "data.log_documents=true"]
    assert main(words(base, out, "whole", *more)) == 0
    return out / "whole"


def samples_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def test_it_learns_and_says_what_it_saw(whole: Path) -> None:
    rows = rows_of(whole)
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == EPOCHS and losses[-1] < 0.5 * float(rows[0]["train/loss"])
    assert len(rows) % EPOCHS == 0
    said = (whole / "log.txt").read_text(encoding="utf-8")
    assert "train: 40 examples (messages) of" in said and "validation.jsonl:1: user" in said
    result = result_of(whole)
    assert result["val_loss"] == pytest.approx(losses[-1]) and result["val_perplexity"] < result["unigram_perplexity"]
    assert result["sample"].startswith("user\n40 and 0?")


def test_answers_stand_in_a_file(whole: Path, base: Path) -> None:
    samples = samples_of(whole)
    an_epoch = len(rows_of(whole)) // EPOCHS
    assert [row["step"] for row in samples] == [an_epoch * (number // 2 + 1) for number in range(2 * EPOCHS)]
    assert [row["example"] for row in samples[:2]] == ["validation.jsonl:1", "validation.jsonl:2"]
    assert samples[0]["prompt"] == "user\n40 and 0?\nassistant\n" and samples[0]["reference"] == "b.\n"
    assert all(row["ended"] and row["completion"].endswith(".") for row in samples[-2:])  # it has learnt to stop


def test_it_resumes_to_the_bit(whole: Path, base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    (broken / "result.json").unlink()
    for folder in (broken / "checkpoints").iterdir():
        if folder != checkpoint_folder(broken / "checkpoints", 7):
            shutil.rmtree(folder)
    more = [*GALORE, "trainer.save_every_steps=7", "trainer.keep_checkpoints=9", "data.log_documents=true"]
    with without_card():
        assert main(words(base, tmp_path, "broken", *more)) == 0
    assert_same_run(broken, whole)
    assert result_of(broken)["sessions"] == 2
    assert samples_of(broken) == samples_of(whole)
    assert (broken / "documents.csv").read_text() == (whole / "documents.csv").read_text()


def test_it_answers_and_exports_with_its_template(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["generate.temperature=0", "generate.max_new_tokens=24", "generate.prompt=40 and 0?"]
    capsys.readouterr()
    assert main(["generate", f"run={whole}", *settings]) == 0
    said = capsys.readouterr().out.strip()
    assert said == samples_of(whole)[-2]["completion"].strip()  # the same question as the first sample
    hub = tmp_path / "hub"
    assert main(["export", f"run={whole}", f"out={hub}"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(hub)
    ids = tokenizer.apply_chat_template(turns("40 and 0?"), add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    model = AutoModelForCausalLM.from_pretrained(hub)
    answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == said
    capsys.readouterr()
    assert main(["generate", f"run={hub}", "generate.chat=true", *settings]) == 0
    assert capsys.readouterr().out.strip() == said
    assert main(["evaluate", f"run={whole}", "trainer.batch_size=3"]) == 0
    assert f"{result_of(whole)['val_loss']:.5f} nats per token" in capsys.readouterr().out


def test_updates_weigh_targets_alike_however_they_are_divided(base: Path, tmp_path: Path) -> None:
    """Rows of very unequal targets in one micro-batch or in four: sums in another order differ by less than 1e-5."""
    common = ["strategy=sgd", "optim.lr=0.1", "trainer.epochs=1", "data.samples=0", "data.packing=pad"]
    one = rows_of_run(base, tmp_path, "one", *common, "trainer.batch_size=8")
    four = rows_of_run(base, tmp_path, "four", *common, "trainer.batch_size=2", "trainer.total_batch_size=8")
    assert len(one) == len(four) == 5
    for a, b in zip(one, four, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), abs=1e-5)
        assert float(a["train/grad_norm"]) == pytest.approx(float(b["train/grad_norm"]), abs=1e-5)


def rows_of_run(base: Path, out: Path, name: str, *more: str) -> list[dict[str, str]]:
    with without_card():
        assert main(words(base, out, name, *more)) == 0
    return rows_of(out / name)


REFUSED = [
    (["data.packing=concat"], "use data.packing=whole"),
    (["data.validation=[]"], "data.validation: names no files"),
    (["data.train=[no.jsonl]"], "data.train: no.jsonl names no file"),
    (["data.num_workers=2"], "means nothing with data.source=chat"),
    (["data.seq_len=256"], "is above the 160 positions"),
    (["data.chat_template=no.jinja"], "data.chat_template=no.jinja: there is no such file"),
    (["data.format=text"], "line 1: has no text"),
    (["data=jsonl", "data.validation=[x]"], "trainer.epochs=8: means something with data=glue and data=chat alone"),
    (["data=jsonl", "~trainer.epochs", "data.samples=2"], "data.samples=2: means something with data=chat alone"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED)
def test_what_cannot_work_is_refused_before_training(
    more: list[str], said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for word in words(base, tmp_path, "r", *more) if not word.startswith("~")]
    if "~trainer.epochs" in more:
        given = [word for word in given if not word.startswith(("trainer.epochs", "data.sample_tokens"))]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not (tmp_path / "r" / "metrics.csv").exists()


def test_folders_with_pickles_or_code_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(base / "model", pickled)
    torch.save(AutoModelForCausalLM.from_pretrained(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    short = ["trainer.steps=1", "data.samples=0", f"model.path={pickled}"]
    given = [word for word in words(base, tmp_path, "p", *short) if not word.startswith("trainer.epochs")]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert "only as a pickle (pytorch_model.bin)" in err and "model.allow_pickle=true" in err
    assert main([*given, "model.allow_pickle=true"]) == 0
    config = json.loads((pickled / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (pickled / "config.json").write_text(json.dumps(config))
    (pickled / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    capsys.readouterr()
    assert main([*given, "run_name=q"]) == 2
    assert "code" in capsys.readouterr().err and not (tmp_path / "ran").exists()
