"""LoRA and its relatives against the package peft: the same layers, factors and AdamW, trained side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.dora import DoRALinear
from lowrank_train.nn.loha import LoHaLinear
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.nn.reparam import ReparamLinear

pytest.importorskip("peft", reason="the package peft is not installed")

SHAPES = {"tall": (24, 10), "wide": (9, 20), "square": (16, 16)}
CASES: dict[str, tuple[type[ReparamLinear], dict[str, Any], dict[str, Any]]] = {
    "lora": (LoRALinear, {}, {}),
    "rslora": (LoRALinear, {"rslora": True}, {"use_rslora": True}),
    "dora": (DoRALinear, {}, {"use_dora": True}),
    "pissa": (LoRALinear, {"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": (LoRALinear, {"init": "olora"}, {"init_lora_weights": "olora"}),
}
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0}
STEPS = 50


def linear(shape: tuple[int, int]) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(shape[1], shape[0], bias=False)  # peft freezes it, here a pattern decides


def by_peft(config: Any, shape: tuple[int, int]) -> Any:
    """peft's layer around the same linear one."""
    from peft import get_peft_model

    model = nn.Sequential(linear(shape))
    return get_peft_model(model, config).base_model.model[0]  # type: ignore[arg-type, index, union-attr]


def train_both(ours: nn.Module, theirs: nn.Module, columns: int, rows: int, tolerance: float) -> None:
    """The same batches through both; outputs of every step agree."""
    optimizers = [
        torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], **ADAMW) for layer in (ours, theirs)
    ]
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        x, target = torch.randn(8, columns, generator=generator), torch.randn(8, rows, generator=generator)
        outputs: list[Tensor] = []
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            out = layer(x)
            (out - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(out.detach())
        torch.testing.assert_close(outputs[0], outputs[1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_lora_and_its_options(case: str, shape: tuple[int, int]) -> None:
    """2e-6 in float32: the same sums in another order, over 50 steps."""
    from peft import LoraConfig

    kind, options, theirs_options = CASES[case]
    theirs = by_peft(LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **theirs_options), shape)
    ours = kind.from_linear(linear(shape), rank=4, alpha=8.0, **options)
    assert isinstance(ours, LoRALinear)
    their_a, their_b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    if case in ("pissa", "olora"):  # the factors' signs are free, their product and what is left of W0 are not
        torch.testing.assert_close(ours.update_of_weight(), ours.weights.scale * their_b @ their_a, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.weight, theirs.get_base_layer().weight, atol=1e-6, rtol=0)
    with torch.no_grad():
        ours.A.copy_(their_a)
        ours.B.copy_(their_b)
    train_both(ours, theirs, shape[1], shape[0], 2e-6)
    delta = theirs.get_delta_weight("default")
    if case != "dora":
        torch.testing.assert_close(ours.update_of_weight(), delta, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loha(shape: tuple[int, int]) -> None:
    """The same bound and reason as above."""
    from peft import LoHaConfig

    theirs = by_peft(LoHaConfig(r=2, alpha=4, target_modules=["0"]), shape)
    ours = LoHaLinear.from_linear(linear(shape), rank=2, alpha=4.0)
    assert isinstance(ours, LoHaLinear)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    with torch.no_grad():
        for factor, name in zip(ours.factors, names, strict=True):
            factor.copy_(getattr(theirs, name)["default"])
    train_both(ours, theirs, shape[1], shape[0], 2e-6)
