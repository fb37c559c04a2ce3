"""LoRA and its relatives on the LLaMAs of the papers: trained numbers in closed form, and the recipes' numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lowrank_train.config import compose
from lowrank_train.config.checks import micro_batches, world_size
from lowrank_train.models import meta_model
from lowrank_train.nn.mora import MoRA
from lowrank_train.nn.reparam import layers_of
from lowrank_train.strategy import Strategy
from tests.nn.methods import ADAMW

# Millions trained at rank 128 with a vocabulary of 32,000: r (m + n) a matrix, and embeddings, head and norms.
LORA_TRAINS = {
    "llama_60m": 42.77,
    "llama_130m": 71.58,
    "llama_250m": 98.73,
    "llama_350m": 125.40,
    "llama_1b": 250.71,
    "llama_7b": 582.23,
}
RELATIVES: list[tuple[str, dict[str, Any]]] = [
    ("lora.LoRA", {}),
    ("lora.LoRA", {"train_a": False}),
    ("dora.DoRA", {}),
    ("loha.LoHa", {}),
    ("mora.MoRA", {}),
    ("parallel_heads.ParallelHeads", {"heads": 2}),
]


def trained(part: str, rank: int, model_name: str, **options: Any) -> tuple[int, list[tuple[int, int]]]:
    """Numbers trained, and the shapes of the matrices that were swapped."""
    model = meta_model(compose(["recipe=null", f"model={model_name}", "task=explain"]).model, vocab_size=32_000)
    config = compose(["recipe=null", "task=explain", "strategy=lora"]).strategy
    config.weights = {"_target_": f"lowrank_train.nn.{part}", "rank": rank, **options}
    config.rest = ADAMW
    Strategy.from_config(config).prepare(model)
    shapes = [(layer.out_features, layer.in_features) for layer in layers_of(model).values()]
    return sum(param.numel() for param in model.parameters() if param.requires_grad), shapes


@pytest.mark.parametrize("name", LORA_TRAINS)
def test_lora_trains_as_many_numbers_as_the_table_says(name: str) -> None:
    assert round(trained("lora.LoRA", 128, name)[0] / 1e6, 2) == LORA_TRAINS[name]


@pytest.mark.parametrize(("part", "options"), RELATIVES, ids=str)
def test_relatives_train_as_many_numbers_as_their_closed_forms_say(part: str, options: dict[str, Any]) -> None:
    """r (m + n) for LoRA, r m for LoRA-FA, and m more for DoRA; twice that for LoHa; H times for H heads; for MoRA the
    square next to r (m + n). Beside the 60M model's 32.78M embeddings, head and norms."""
    count, shapes = trained(part, 32, "llama_60m", **options)
    assert len(shapes) == 56
    dense = 2 * 32_000 * 512 + (2 * 8 + 1) * 512
    closed = {
        "LoRA": sum(32 * (m if options else m + n) for m, n in shapes),
        "DoRA": sum(32 * (m + n) + m for m, n in shapes),
        "LoHa": sum(2 * 32 * (m + n) for m, n in shapes),
        "MoRA": sum(round(math.sqrt(32 * (m + n))) ** 2 for m, n in shapes),
        "ParallelHeads": sum(2 * 32 * (m + n) for m, n in shapes),
    }
    assert count == dense + closed[part.partition(".")[2]]
    assert MoRA(rank=32).side((512, 512)) == 181


# rank, steps, warm-up, lr, rows an update, row length, devices; merge.every, moments, share, cycle, re-warm-up
RECIPES = {
    "lora_60m": (128, 10_000, 1_000, 1e-3, 512, 256, 1, None),
    "lora_130m": (256, 20_000, 2_000, 1e-3, 512, 256, 1, None),
    "lora_350m": (256, 60_000, 6_000, 1e-3, 512, 256, 4, None),
    "lora_1b": (512, 100_000, 10_000, 4e-4, 512, 256, 8, None),
    "relora_60m": (128, 10_000, 500, 1e-3, 512, 256, 1, (5_000, "magnitude", 0.9, 5_000, 100)),
    "relora_130m": (256, 20_000, 500, 1e-3, 512, 256, 1, (5_000, "magnitude", 0.9, 5_000, 100)),
    "relora_250m": (128, 20_000, 500, 1e-3, 1_152, 512, 1, (5_000, "random", 0.999, 5_000, 100)),
    "relora_350m": (256, 60_000, 500, 1e-3, 512, 256, 4, (5_000, "magnitude", 0.9, 5_000, 100)),
    "relora_1b": (512, 100_000, 500, 4e-4, 512, 256, 8, (1_000, "magnitude", 0.8, 1_000, 100)),
    "remora_250m": (128, 10_000, 1_000, 5e-4, 1_024, 512, 32, (2_000, "fresh", 0.9, 2_000, 50)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_numbers_of_their_sources(name: str) -> None:
    config = compose([f"recipe={name}"])
    rank, steps, warmup, lr, rows, length, devices, rounds = RECIPES[name]
    optim, weights, merge = config.optim, config.strategy.weights, config.strategy.merge
    assert weights is not None
    assert (weights["rank"], config.trainer.steps, optim.warmup_steps, optim.lr) == (rank, steps, warmup, lr)
    assert micro_batches(config) * config.trainer.batch_size * world_size(config) == rows
    assert (config.data.seq_len, world_size(config), optim.weight_decay) == (length, devices, 0)
    if rounds is None:
        assert merge is None
        assert optim.schedule == "cosine"
        return
    assert merge is not None
    found = merge["every"], merge["moments"], merge["share"], optim.cycle_steps, optim.restart_warmup_steps
    assert found == rounds
    assert weights["rounding"] == "compensated"
    assert weights.get("alpha", 32.0) == 32.0
    assert weights["dropout"] == (0.05 if name == "remora_250m" else 0.1)
    assert weights.get("warm_start_steps", 0) == (5_000 if name == "relora_250m" else 0)
