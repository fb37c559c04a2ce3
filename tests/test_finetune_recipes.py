"""Recipes for fine-tuning on one's own text: they compose beside a folder and two files, and say what is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from lowrank_train.config import RunConfig, compose
from lowrank_train.config.paths import RECIPES
from lowrank_train.config.recipes import FIELDS, read_head
from lowrank_train.memory.counting import weights_bytes
from lowrank_train.models import meta_model
from lowrank_train.strategy import Strategy

NAMES = ("chat_full", "chat_galore", "chat_lora", "continue_text")
PARAMETERS = 134_515_008  # of SmolLM2-135M, for which the heads count


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sizes without its numbers."""
    folder = tmp_path_factory.mktemp("smollm")
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True).save_pretrained(folder)
    return folder


def composed(name: str, folder: Path) -> RunConfig:
    return compose(
        [f"recipe=finetune/{name}", f"model.path={folder}", "data.train=[a.jsonl]", "data.validation=[b.jsonl]"]
    )


def test_all_have_a_check() -> None:
    assert {path.stem for path in (RECIPES / "finetune").glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_head_says_what_the_recipe_is(name: str, smollm: Path) -> None:
    head, config = read_head(RECIPES / "finetune" / f"{name}.yaml"), composed(name, smollm)
    assert tuple(head.facts) == FIELDS
    assert head.facts["method"].startswith(config.strategy.name)
    part = config.strategy.subspace or config.strategy.weights
    assert part is None or head.facts["method"].endswith(f"rank {part['rank']}")
    assert f"{config.trainer.total_batch_size} rows of {config.data.seq_len} tokens" in head.facts["data"]
    assert f"recipe=finetune/{name} model.path=" in head.facts["command"]
    assert (config.data.source, config.data.mask_documents) == (
        ("text", False) if name == "continue_text" else ("chat", True)
    )
    assert config.data.tokenizer == str(smollm)


@pytest.mark.parametrize("name", NAMES)
def test_head_states_what_is_counted(name: str, smollm: Path) -> None:
    config = composed(name, smollm)
    model = meta_model(config.model, vocab_size=49152)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    strategy = Strategy.from_config(config.strategy, seed=config.seed)
    strategy.prepare(model)
    rows = strategy.assignment(model)
    stated = re.match(r"([\d.]+) GB", read_head(RECIPES / "finetune" / f"{name}.yaml").facts["counted"])
    assert stated and float(stated[1]) == round((weights_bytes(model) + sum(row.state_bytes for row in rows)) / 1e9, 3)
    if name == "chat_lora":
        assert {row.name.rpartition(".")[2] for row in rows if row.role != "frozen"} == {"lora_A", "lora_B"}
