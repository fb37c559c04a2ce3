"""GLUE's recipes: all tasks under all methods, the published settings, and the bytes that their heads state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig

from lowrank_train.config import RunConfig, compose
from lowrank_train.config.paths import RECIPES
from lowrank_train.config.recipes import FIELDS, read_head
from lowrank_train.data.glue import TASKS
from lowrank_train.memory.counting import weights_bytes
from lowrank_train.models import meta_model, outputs_of
from lowrank_train.strategy import Strategy

METHODS = ("full", "galore", "lora")
LORA = {  # github.com/microsoft/LoRA, RoBERTa base: rows of an update, learning rate, epochs
    "mnli": (16, 5e-4, 30), "sst2": (16, 5e-4, 60), "mrpc": (16, 4e-4, 30), "cola": (32, 4e-4, 80),
    "qnli": (32, 4e-4, 25), "qqp": (16, 5e-4, 25), "rte": (32, 5e-4, 80), "stsb": (16, 4e-4, 40),
}  # fmt: skip


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sizes of RoBERTa base without its numbers; transformers' defaults are BERT's."""
    folder = tmp_path_factory.mktemp("roberta")
    RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_recipe_for_every_method(task: str, method: str) -> None:
    config = compose([f"recipe=glue/{task}_{method}"])
    assert (config.data.source, config.data.task, config.strategy.name) == ("glue", task, method)
    assert (config.model.name, config.data.seq_len) == ("roberta_base", 512)
    assert config.data.tokenizer == config.model.path == "FacebookAI/roberta-base"
    assert config.data.revision is not None and config.model.revision is not None
    assert config.run_name == f"roberta_base-{method}-{task}"
    assert (config.optim.schedule, config.optim.min_lr_ratio) == ("linear", 0)


@pytest.mark.parametrize("task", LORA)
def test_lora_is_as_its_authors_ran_it(task: str) -> None:
    config = compose([f"recipe=glue/{task}_lora"])
    assert (config.trainer.batch_size, config.optim.lr, config.trainer.epochs) == LORA[task]
    assert (config.optim.warmup_ratio, config.optim.weight_decay) == (0.06, 0.1)
    assert config.strategy.weights is not None
    assert [config.strategy.weights[key] for key in ("rank", "alpha")] == [8, 16]


@pytest.mark.parametrize("task", TASKS)
def test_galore_is_as_its_authors_ran_it(task: str) -> None:
    config = compose([f"recipe=glue/{task}_galore"])
    strategy = config.strategy
    assert strategy.subspace is not None and strategy.lift is not None
    assert (strategy.subspace["rank"], strategy.subspace["every"], strategy.lift["scale"]) == (4, 500, 4)
    assert config.trainer.epochs == 30 and config.optim.weight_decay == 0
    assert config.trainer.batch_size == (32 if task == "cola" else 16)
    assert 1e-5 <= config.optim.lr <= 3e-5
    if task == "mrpc":
        assert config.optim.lr == 3e-5


def trained(config: RunConfig) -> tuple[int, int, set[str]]:
    """Bytes of weights, of state, and the names of the matrices that are not frozen."""
    model = meta_model(config.model, vocab_size=50265, outputs=outputs_of(config.data))
    strategy = Strategy.from_config(config.strategy, seed=config.seed)
    strategy.prepare(model)
    rows = strategy.assignment(model)
    state = sum(row.state_bytes for row in rows)
    return weights_bytes(model), state, {row.name for row in rows if row.role != "frozen"}


@pytest.mark.parametrize("method", METHODS)
def test_head_states_what_is_counted(method: str, roberta: Path) -> None:
    head = read_head(RECIPES / "glue" / f"{method}.yaml")
    assert tuple(head.facts) == FIELDS
    config = compose([f"recipe=glue/{method}", f"model.path={roberta}", "model.revision=null"])
    weights, state, names = trained(config)
    stated = re.match(r"([\d.]+) GB; weights and optimizer state", head.facts["counted"])
    assert stated is not None
    assert round((weights + state) / 1e9, 3) == float(stated[1])
    if method == "lora":
        head_names = {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
        assert {name for name in names if "lora" not in name} == head_names
        assert len(names) == 12 * 2 * 2 + 4


def test_galore_projects_the_matrices_of_the_encoder_alone(roberta: Path) -> None:
    config = compose(["recipe=glue/galore", f"model.path={roberta}", "model.revision=null"])
    model = meta_model(config.model, vocab_size=50265, dtype=torch.float32, outputs=2)
    strategy = Strategy.from_config(config.strategy, seed=0)
    strategy.prepare(model)
    projected = {row.name for row in strategy.assignment(model) if row.role == "projected"}
    matrices = {name for name, param in model.named_parameters() if ".layer." in name and param.ndim == 2}
    assert projected == matrices and len(projected) == 12 * 6
