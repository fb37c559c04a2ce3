"""Adapters train what their closed forms say, all of it by the second update, and leave the rest as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_train.config.parts import instantiate
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights
from tests.nn.test_lora import linear_of

SHAPES = [(20, 12), (8, 20), (16, 16)]  # (out, in): tall, wide, square
R = 2
CLOSED_FORMS: list[tuple[str, dict[str, Any], Callable[[int, int], int]]] = [
    ("three_factors.LoRAXS", {}, lambda m, n: R * R),
    ("three_factors.CURLoRA", {}, lambda m, n: R * R),
    ("three_factors.SVFit", {}, lambda m, n: R),
    ("three_factors.SORSA", {}, lambda m, n: R * (m + n + 1)),
    ("three_factors.LoLDU", {"alpha": 4.0}, lambda m, n: R + 1),
    ("allora.ALLoRA", {}, lambda m, n: R * (m + n)),
    ("lamda.LaMDA", {"stages": 2}, lambda m, n: R * (m + R)),
    ("lora_ggpo.LoRAGGPO", {}, lambda m, n: R * (m + n)),
    ("between.MoSLoRA", {}, lambda m, n: R * (m + n + R)),
    ("between.SoRA", {}, lambda m, n: R * (m + n + 1)),
    ("patterned_lora.MELoRA", {"minis": 4}, lambda m, n: R * (m + n)),
    ("patterned_lora.CapaBoost", {}, lambda m, n: R * (m + n)),
    ("dylora.DyLoRA", {}, lambda m, n: R * (m + n)),
    ("lora_pro.LoRAPro", {}, lambda m, n: R * (m + n)),
    ("nola.NOLA", {"bases": 5}, lambda m, n: 10),
]


def built(target: str, shape: tuple[int, int], options: dict[str, Any]) -> ReparamLinear:
    weights = instantiate({"_target_": f"lowrank_train.nn.{target}", "rank": R, **options})
    assert isinstance(weights, Weights)
    return weights.layer(linear_of(shape), Origin("a"))


@pytest.mark.parametrize(("target", "options", "closed"), CLOSED_FORMS, ids=[row[0] for row in CLOSED_FORMS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trains_the_closed_form_and_nothing_else(
    target: str, options: dict[str, Any], closed: Callable[[int, int], int], shape: tuple[int, int]
) -> None:
    """A factor behind one that begins at 0 has no gradient at the first update, and must have one at the second."""
    layer = built(target, shape, options)
    trained = {name: param for name, param in layer.named_parameters() if param.requires_grad}
    assert sum(param.numel() for param in trained.values()) == closed(*shape)
    frozen = {name: value.clone() for name, value in layer.state_dict().items() if name not in trained}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(32, size, dtype=torch.float64, generator=generator) for size in reversed(shape))
    for step in range(1, 11):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        if step == 2:
            assert all(param.grad is not None and param.grad.any() for param in trained.values())
        optimizer.step()
    for name, value in frozen.items():
        assert torch.equal(layer.state_dict()[name], value), name
