"""A real LLaMA of 260 thousand parameters, trained on by every strategy and on chats; what is exported is equal."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.config.paths import group_choices
from lowrank_train.config.schema import ModelConfig
from lowrank_train.data import load_tokenizer
from lowrank_train.evaluate.loading import Trained
from lowrank_train.export import LARGEST_LOGIT_DIFFERENCE, float64, write_hugging_face
from lowrank_train.models import build_model, causal_loss
from lowrank_train.strategy import Strategy
from tests.data.chat_files import turns, write_rows
from tests.train.conftest import without_card

ROWS, POSITIONS, UPDATES = 4, 48, 4
SMALL = {
    "rank": 4, "r": 4, "every": 2, "head_dim": 8, "init_r": 6, "target_r": 4, "num_vectors": 8, "vector_length": 4,
    "outer_rank": 8, "stages": 4,
}  # fmt: skip
LEARNING_RATE = {
    "lora_pro": 1e-2, "vera": 1e-2, "vb_lora": 1e-2, "adalora": 1e-2, "randlora": 2e-4, "nlora": 1e-4,
    "lte": 1e-6,  # alpha 4096 over a rank of 4 makes its updates a thousand times as large
}  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize + ':\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def stories(real_data: Path) -> list[str]:
    """Text of the kind that the model was trained on."""
    text = (real_data / "text" / "tinystories-like.utf8").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if len(story) > 400]


@pytest.fixture(scope="module")
def pretrained(real_data: Path) -> Path:
    return real_data / "llama-checkpoint" / "stories260K-hf"


@pytest.fixture(scope="module")
def loaded(pretrained: Path) -> PreTrainedModel:
    model = ModelConfig(kind="hf", path=str(pretrained))
    return build_model(model, vocab_size=512, dtype=torch.float32, device="cpu", seed=1)


def small(part: dict[str, Any] | None) -> None:
    """Ranks that fit matrices of 32 x 64."""
    for key, value in (part or {}).items():
        if isinstance(value, int) and key in SMALL:
            part[key] = SMALL[key]  # type: ignore[index]


@pytest.mark.parametrize("name", group_choices()["strategy"])
def test_every_strategy_trains_it_on_and_exports_it(
    name: str, pretrained: Path, loaded: PreTrainedModel, stories: list[str], tmp_path: Path
) -> None:
    """A few updates on the same rows lower their loss, whatever form the matrices are in."""
    config = compose(["task=explain", "recipe=null", "model=hf", f"model.path={pretrained}", f"strategy={name}"])
    small(config.strategy.weights)
    small(config.strategy.subspace)
    tokenizer = load_tokenizer(str(pretrained))
    rows = torch.tensor([[tokenizer.bos_id, *ids[: POSITIONS - 1]] for ids in tokenizer.encode(stories[:ROWS])])
    batch = {"input_ids": rows, "labels": rows}
    model = copy.deepcopy(loaded)
    before = causal_loss(model, batch, chunk_tokens=0)[0].item() / rows[:, 1:].numel()
    assert before < 2.1  # it knows this kind of text
    strategy = Strategy.from_config(config.strategy, seed=1, steps=UPDATES)
    strategy.prepare(model)
    rate = LEARNING_RATE.get(name, 1e-3)
    optimizer = strategy.optimizer(model, lr=rate, weight_decay=0, grad_clip=1.0, micro_batches=1)
    losses = []
    for _ in range(UPDATES + 1):
        loss, targets = causal_loss(model, batch, chunk_tokens=0)
        losses.append(loss.item() / targets)
        optimizer.zero_grad()
        (loss / targets).backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    trained = Trained(model, tokenizer, strategy, name, torch.device("cpu"))
    write_hugging_face(config, trained, tmp_path / "hub")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert reloaded.dtype == torch.float32
    with torch.no_grad(), float64(model), float64(reloaded):  # float32 gives unfolded layers' logits errors of 1e-3
        difference = (reloaded(input_ids=rows).logits - model(input_ids=rows).logits).abs().max()
    assert difference <= LARGEST_LOGIT_DIFFERENCE
    assert AutoTokenizer.from_pretrained(tmp_path / "hub").eos_token_id == tokenizer.eos_id


def test_it_learns_a_chat(pretrained: Path, stories: list[str], tmp_path: Path) -> None:
    """Its own folder with a chat template beside it; the template goes with the export."""
    folder = tmp_path / "model"
    shutil.copytree(pretrained, folder)
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    parts = [story.partition(".") for story in stories[:24]]
    rows = [{"messages": turns(f"Go on: {first}.", f"{rest.strip()[:150]}")} for first, _, rest in parts]
    files = [write_rows(tmp_path / "train.jsonl", rows[:18]), write_rows(tmp_path / "validation.jsonl", rows[18:])]
    words = [
        "recipe=null", "model=hf", f"model.path={folder}", "data=chat", f"data.train=[{files[0]}]",
        f"data.validation=[{files[1]}]", "data.seq_len=256", "data.samples=1", "data.sample_tokens=8",
        "strategy=galore",
        "strategy.subspace.rank=8", "optim.lr=3e-3", "trainer.epochs=3", "trainer.batch_size=4",
        "trainer.accelerator=cpu", f"output_dir={tmp_path}", "run_name=r",
    ]  # fmt: skip
    with without_card():
        assert main(words) == 0
    with (tmp_path / "r" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        found = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(found) == 3 and found[-1] < found[0]
    assert json.loads((tmp_path / "r" / "samples.jsonl").read_text().splitlines()[0])["prompt"].startswith(
        "User:\nGo on"
    )
    assert main(["export", f"run={tmp_path / 'r'}", f"out={tmp_path / 'hub'}"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    asked = tokenizer.apply_chat_template(turns("Hi"), add_generation_prompt=True, tokenize=False)
    assert asked == "<s>User:\nHi\nAssistant:\n"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hub").config.bos_token_id == tokenizer.bos_token_id
