"""Every recipe composes, builds, and says in its head what it claims; the bytes it states are counted on meta."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from lowrank_train.config import RunConfig, compose, paths
from lowrank_train.config.checks import micro_batches, world_size
from lowrank_train.config.errors import UserError
from lowrank_train.config.paths import group_choices, recipe_files, recipe_name
from lowrank_train.config.recipes import FIELDS, read_head, table
from lowrank_train.memory.counting import weights_bytes
from lowrank_train.models import meta_model
from lowrank_train.strategy import Strategy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECIPES = [path for path in recipe_files() if "/" not in recipe_name(path)]  # GLUE's: test_glue_recipes.py
BUNDLED_VOCABULARY = 2048  # pieces of the tokenizer under data/shakespeare
CARD_BYTES = {"RTX 4080": 16e9, "RTX 4090": 24e9}  # at most this much may be persistent on the card a recipe names

# Hyper-parameters of the paper's table of C4 runs and of the authors' scripts:
# steps, warm-up, rank, gap, lr, clip, rows an update, devices
PUBLISHED = {
    "galore_60m": (10_000, 1_000, 128, 200, 0.01, None, 512, 1),
    "galore_130m": (20_000, 2_000, 256, 200, 0.01, None, 512, 1),
    "galore_350m": (60_000, 6_000, 256, 200, 0.01, None, 512, 4),
    "galore_1b": (100_000, 10_000, 512, 200, 0.01, None, 512, 8),
    "galore_7b": (150_000, 15_000, 1024, 500, 0.005, 1.0, 512, 64),
    "galore_7b_4090": (150_000, 15_000, 1024, 500, 0.005, None, 16, 1),
}
# Millions of parameters, all and those of the projected matrices.
MODEL_SIZES = {
    "llama_9m": (9.00, 0.80),
    "llama_20m": (19.55, 3.16),
    "llama_35m": (35.20, 10.62),
    "llama_60m": (58.07, 25.30),
    "llama_130m": (134.11, 84.93),
    "llama_250m": (247.37, 198.18),
    "llama_350m": (367.97, 302.38),
    "llama_1b": (1339.08, 1207.91),
    "llama_3b": (2685.83, 2521.83),
    "llama_7b": (6738.42, 6476.01),
}


@functools.cache
def composed(name: str) -> RunConfig:
    return compose([f"recipe={name}"])


def persistent_bytes(config: RunConfig) -> tuple[int, int]:
    """Bytes of the weights and of the optimizer's state, counted."""
    model = meta_model(config.model, vocab_size=BUNDLED_VOCABULARY, dtype=DTYPES[config.precision.weights])
    strategy = Strategy.from_config(
        config.strategy,
        state_dtype=DTYPES[config.precision.state],
        seed=config.seed,
        int8_group=config.precision.int8_group,
    )
    strategy.prepare(model)
    optimizer = strategy.optimizer(
        model,
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        grad_clip=config.optim.grad_clip,
        clip_norm_of=config.optim.clip_norm_of,
        micro_batches=micro_batches(config),
    )
    optimizer.initialize()
    return weights_bytes(model), sum(optimizer.state_bytes().values())


def test_there_are_recipes_for_the_published_runs() -> None:
    assert set(PUBLISHED) | {"default"} <= {recipe_name(path) for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=recipe_name)
def test_recipe_composes_and_builds_and_its_bytes_are_as_stated(path: Path) -> None:
    config, head = composed(recipe_name(path)), read_head(path)
    weights_bytes, state_bytes = persistent_bytes(config)
    stated = re.match(r"([\d.]+) GB; weights and optimizer state", head.facts["counted"])
    assert stated, head.facts["counted"]
    decimals = len(stated[1].partition(".")[2])
    assert round((weights_bytes + state_bytes) / 1e9, decimals) == float(stated[1])
    for card, most in CARD_BYTES.items():
        if card in head.facts["card"]:
            assert weights_bytes + state_bytes < most


@pytest.mark.parametrize(
    ("words", "most_gb"),
    [
        (["recipe=galore_7b_4090"], 19.2),
        (["recipe=q_galore_7b_16gb"], 11.5),
        (["model=llama_7b", "strategy=q_apollo_mini", "precision=int8"], 8.0),
    ],
    ids=["GaLore, 8-bit", "Q-GaLore", "quantised APOLLO-Mini"],
)
def test_bytes_that_7b_keeps(words: list[str], most_gb: float) -> None:
    assert sum(persistent_bytes(compose(words))) <= most_gb * 1e9


Q_GALORE = {  # arXiv 2407.08296 and its scripts: steps, warm-up, rank, gap, lr, rows an update
    "q_galore_60m": (10_000, 1_000, 128, 200, 0.015, 512),
    "q_galore_130m": (20_000, 2_000, 256, 200, 0.015, 512),
    "q_galore_350m": (60_000, 6_000, 256, 200, 0.01, 512),
    "q_galore_1b": (100_000, 10_000, 512, 200, 0.01, 512),
    "q_galore_7b_16gb": (150_000, 15_000, 1024, 500, 0.004, 16),
}


@pytest.mark.parametrize("name", Q_GALORE)
def test_q_galore_is_as_published(name: str) -> None:
    config = composed(name)
    steps, warmup, rank, every, lr, rows = Q_GALORE[name]
    strategy, inner = config.strategy, config.strategy.inner
    assert strategy.subspace is not None and strategy.lift is not None and strategy.refresh is not None
    assert inner is not None
    assert (config.trainer.steps, config.optim.warmup_steps, config.optim.lr) == (steps, warmup, lr)
    assert micro_batches(config) * config.trainer.batch_size == rows
    assert [strategy.subspace[key] for key in ("rank", "every", "storage_group")] == [rank, every, 256]
    assert strategy.storage is not None and strategy.storage["basis"] == "q4"
    assert [strategy.refresh[key] for key in ("threshold", "window", "growth")] == [0.4, 5, 2]
    assert strategy.lift["scale"] == 0.25
    for rule in (inner, strategy.rest):
        assert rule["betas"] == ((0.9, 0.999) if rows == 16 else (0.9, 0.95))
    precision = config.precision
    assert (precision.name, precision.rounding, precision.int8_group) == ("int8", "stochastic", 256)


@pytest.mark.parametrize("path", RECIPES, ids=recipe_name)
def test_head_says_what_the_recipe_is(path: Path) -> None:
    head, config = read_head(path), composed(recipe_name(path))
    assert head.title.endswith(".")
    assert tuple(head.facts) == FIELDS
    assert head.facts["model"] == config.model.name
    assert head.facts["method"].startswith(config.strategy.name)
    assert config.strategy.subspace is None or f"rank {config.strategy.subspace['rank']}" in head.facts["method"]
    assert f"{config.trainer.steps:,} updates" in head.facts["data"]
    assert f"{config.data.seq_len} tokens" in head.facts["data"]
    command = head.facts["command"].split()
    words = [word for word in command[command.index("train.py") + 1 :] if word != "-m"]  # a sweep's first value
    assert words == ([] if recipe_name(path) == "default" else [f"recipe={recipe_name(path)}"])
    assert compose(words) == config


@pytest.mark.parametrize("path", RECIPES, ids=recipe_name)
def test_recipe_is_choices_and_numbers_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    assert not re.search(r"_target_|\$\{", text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyperparameters_are_the_published_ones(name: str) -> None:
    config = composed(name)
    steps, warmup, rank, every, lr, clip, rows, devices = PUBLISHED[name]
    subspace, inner, lift = config.strategy.subspace, config.strategy.inner, config.strategy.lift
    assert subspace is not None
    assert (config.trainer.steps, config.optim.warmup_steps) == (steps, warmup)
    assert (subspace["rank"], subspace["every"], subspace["side"]) == (rank, every, "std")
    assert (subspace["_target_"].rpartition(".")[2], subspace["stagger"]) == ("Randomized", True)  # said in the heads
    assert (config.optim.lr, config.optim.grad_clip, config.optim.weight_decay) == (lr, clip, 0)
    assert (config.optim.schedule, config.optim.min_lr_ratio) == ("cosine", 0.1)
    assert inner is not None
    for rule in (inner, config.strategy.rest):  # transformers' conventions for eps; bitsandbytes' for 8-bit state
        expected = (1e-8, True) if config.strategy.name == "galore_8bit" else (1e-6, False)
        assert (rule["betas"], rule["eps"], rule["eps_inside"]) == ((0.9, 0.999), *expected)
    assert lift is not None
    assert lift["scale"] == 0.25
    assert config.strategy.on_refresh == "keep"
    assert micro_batches(config) * config.trainer.batch_size * world_size(config) == rows
    assert world_size(config) == devices
    assert (config.data.name, config.data.packing, config.data.seq_len) == ("c4", "pad", 256)
    assert config.precision.name == "bf16"


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_models_have_the_published_sizes(name: str) -> None:
    config = compose([f"model={name}"])
    model = meta_model(config.model, vocab_size=BUNDLED_VOCABULARY)
    linear = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n or "mlp" in n)
    total = sum(p.numel() for p in model.parameters())
    assert (round(total / 1e6, 2), round(linear / 1e6, 2)) == MODEL_SIZES[name]
    head = (paths.CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    assert f"{total / 1e6:.2f} million parameters, {linear / 1e6:.2f} million" in head


NEEDED = {  # by a choice, beside it
    "model=hf": ["model.path=gpt2"],
    "data=jsonl": ["data.train=[x.jsonl]"],
    "data=text": ["data.train=[x.txt]"],
    "data=tokens": ["data.train=[x]"],
    "data=chat": ["data.train=[x.jsonl]", "data.validation=[y.jsonl]"],
    "strategy/merge=periodic": ["strategy/weights=lora"],
    "trainer=deepspeed_zero1": ["strategy=full"],
    "trainer=deepspeed_zero2": ["strategy=full"],
    "trainer=deepspeed_zero3": ["strategy=full"],
}


def one_of_each(groups: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The choices of several groups as command lines: the first choice of each, the second of each, ..."""
    words = [[f"{group}={choice}" for choice in choices] for group, choices in groups.items()]
    return [[word for word in row if word] for row in itertools.zip_longest(*words)]


def test_every_choice_of_every_group_composes() -> None:
    """Groups whose choices do not restrict one another are tried at once; a fault names its key, file and line.

    A trainer refuses some precisions: it comes alone. Every strategy is composed by test_support.py, every recipe by
    other tests here, in test_glue_recipes.py and in test_finetune_recipes.py.
    """
    groups = group_choices()
    names = [name for name in groups.pop("recipe") if not name.startswith(("glue/", "finetune/"))]
    assert sorted(names) == sorted(map(recipe_name, RECIPES))
    del groups["strategy"]
    trainers = {"trainer": groups.pop("trainer")}
    groups["launcher"].remove("slurm")
    with pytest.raises(UserError, match="add -m"):
        compose(["launcher=slurm", "strategy=full"])
    axes = {group: choices for group, choices in groups.items() if group.startswith("strategy/")}
    others = {group: choices for group, choices in groups.items() if group not in axes}
    for words in itertools.chain.from_iterable(map(one_of_each, (trainers, axes, others))):
        config = compose([*words, *itertools.chain.from_iterable(NEEDED.get(word, []) for word in words)])
        for group, _, choice in (word.partition("=") for word in words):
            part = getattr(config.strategy, group.removeprefix("strategy/"), None)
            assert part or group not in axes, f"{group}={choice} is not there"
            node = getattr(config, group, None)
            assert node is None or group in ("optim", "trainer") or node.name == choice


def test_list_shows_every_recipe_within_the_width() -> None:
    heads = [read_head(path) for path in RECIPES]
    lines = table(heads, 140).splitlines()
    assert max(len(line) for line in lines) <= 140
    names = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert [name for name in names if name.startswith(("default", "galore"))][:3] == [
        "default",
        "galore_60m",
        "galore_130m",
    ]
    assert {head.name for head in heads} <= set(names)
