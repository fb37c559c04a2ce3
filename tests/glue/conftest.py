"""What the tests of GLUE runs share: small data, a small encoder, and the words of a run under each wing."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaModel

from lowrank_train.checkpoint import Kind, load_weights, newest_complete, read_manifest
from lowrank_train.cli import main
from tests.data.glue_files import write_glue, write_tokenizer
from tests.train.conftest import WALL_CLOCK_COLUMNS, without_card

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GALORE = ["strategy=galore", "strategy.subspace.rank=4", "strategy.subspace.every=10", "strategy.lift.scale=1"]
SELECT = "strategy.select=[*.attention.self.*.weight,*.intermediate.dense.weight,*.output.dense.weight]"
WINGS = {
    "full": ["strategy=full", "optim.lr=1e-2"],
    "galore": [*GALORE, SELECT, "optim.lr=1e-2"],
    "lora": [
        "strategy=lora", "strategy/inner=adamw", "strategy.weights.modules=[*.query,*.value]",
        "strategy.weights.rank=4",
        "strategy.select=[*.lora_A,*.lora_B]", "strategy.freeze_rest=true", "optim.lr=8e-3",
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

    def call(name: str, task: str, *more: str, code: int = 0, card: bool = False) -> Path:
        given = {word.partition("=")[0] for word in more}
        words = [
            "recipe=null", "model=hf", f"model.path={encoder}", "data=glue", f"data.task={task}", f"data.folder={glue}",
            "data.seq_len=40", "trainer.batch_size=8", "trainer.epochs=4", "trainer.accelerator=cpu", "seed=1",
            "optim=linear", "strategy=full", f"output_dir={tmp_path}", f"run_name={name}",
        ]  # fmt: skip
        kept = [word for word in words if word.partition("=")[0] not in given]
        with contextlib.nullcontext() if card else without_card():
            assert main([*kept, *more]) == code
        return tmp_path / name

    return call


def roberta(folder: Path) -> Path:
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=42, pad_token_id=1)).save_pretrained(folder)
    return write_tokenizer(folder)


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in WALL_CLOCK_COLUMNS} for row in csv.DictReader(file)]


def weights_of(folder: Path, kind: Kind = "step") -> dict[str, torch.Tensor]:
    """Of the last checkpoint, or of the best."""
    checkpoint, _ = newest_complete(folder / "checkpoints", kind)
    assert checkpoint is not None
    return load_weights(checkpoint, read_manifest(checkpoint))
