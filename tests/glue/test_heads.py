"""The head of a task, random at first, is trained whole under every strategy that freezes the rest of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, LlamaForCausalLM, RobertaConfig

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.nn.reparam import layers_of
from lowrank_train.report.banner import head_lines
from lowrank_train.strategy import Strategy
from lowrank_train.strategy_checks import row_head
from tests.glue.conftest import SIZES
from tests.nn.methods import ADAMW

CONFIGS: dict[str, Any] = {"bert": BertConfig, "roberta": RobertaConfig, "llama": LlamaConfig}
HEADS = {
    "bert": {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "llama": {"score.weight"},
}
LORA = {"_target_": "lowrank_train.nn.lora.LoRA", "rank": 2, "modules": ["*"]}
VERA = {"_target_": "lowrank_train.nn.peft.Peft", "type": "VERA", "r": 2, "modules": ["*"]}
STRATEGIES = {
    "lora": {"weights": LORA, "select": ["*.lora_A", "*.lora_B"], "inner": ADAMW, "freeze_rest": True},
    "peft": {"weights": VERA},
    "every linear layer": {"weights": LORA | {"modules": []}, "select": ["*.lora_B"], "inner": ADAMW,
                           "freeze_rest": True},
    "some matrices": {"select": ["*.layer*.0.*proj*.weight", "*.layer*.0.*query.weight"], "inner": ADAMW,
                      "freeze_rest": True},
}  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[kind](**SIZES, max_position_embeddings=40, pad_token_id=0, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


def strategy_of(kind: str, name: str) -> Strategy:
    settings: dict[str, Any] = dict(STRATEGIES[name])
    if name == "some matrices":
        settings["select"] = [settings["select"][0 if kind == "llama" else 1]]
    return Strategy.from_config(StrategyConfig(name="x", rest=ADAMW, **settings), seed=1)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_trained_and_what_is_frozen_stays(kind: str, name: str) -> None:
    model, strategy = model_of(kind), strategy_of(kind, name)
    assert row_head(model) == HEADS[kind]
    strategy.prepare(model)
    assert row_head(model) == HEADS[kind], "its layers stay dense"
    assert not any(layer in head for layer in layers_of(model) for head in HEADS[kind])
    rows = strategy.assignment(model)
    trained = {row.name for row in rows if row.role != "frozen"}
    assert trained >= HEADS[kind] and len(trained) < len(rows)
    assert all(row.state_bytes for row in rows if row.name in HEADS[kind])
    [line] = head_lines(rows, row_head(model))
    assert all(head.rpartition(".")[0] in line for head in HEADS[kind])
    optimizer = strategy.optimizer(model, lr=1e-2)
    assert {group["name"] for group in optimizer.param_groups} <= set(strategy.group_names(model))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for _ in range(2):
        model(input_ids=torch.arange(3, 23).view(2, 10), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert HEADS[kind] <= moved <= trained


def test_other_models_have_none() -> None:
    """A language model's head is no head of a task: `freeze_rest` freezes it too."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert row_head(model) == set() and row_head(torch.nn.Linear(2, 2)) == set()
    strategy = strategy_of("llama", "every linear layer")
    strategy.prepare(model)
    assert {row.name for row in strategy.assignment(model) if row.role != "frozen"} == {
        f"{layer}.lora_B" for layer in layers_of(model)
    }
    assert strategy.group_names(model) == ["projected"]


def test_adapters_on_the_head_alone_are_refused() -> None:
    strategy = Strategy.from_config(
        StrategyConfig(name="x", rest=ADAMW, weights=LORA | {"modules": ["classifier"]}), seed=1
    )
    with pytest.raises(UserError, match="takes in nothing but the head, classifier"):
        strategy.prepare(model_of("bert"))
