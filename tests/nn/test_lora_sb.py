"""LoRA-SB's start: the leading part of Adam's first step of full fine-tuning, and nothing but C trained after it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowrank_train.nn.lora_sb import LoRASBLinear
from lowrank_train.nn.reparam import layers_of
from lowrank_train.strategy import Strategy
from tests.nn.methods import Toy, batch_of, train
from tests.nn.test_lora import linear_of, row


def adapters_alone() -> Strategy:
    """Nothing else is trained, so that a plain model's gradients can be compared over two updates."""
    inner = {"_target_": "lowrank_train.optim.moments.Adam"}
    return row("lora_sb").strategy(select=["*.core"], inner=inner, freeze_rest=True)


def test_factors_are_the_leading_part_of_the_first_step() -> None:
    """Against the gradients of the plain model on the first two batches, for a tall, a wide and a square matrix, with
    a rate of 0 in the first update as in a warm-up. 1e-12: float64 decompositions of matrices with entries of 0.02."""
    plain, model = Toy(torch.float64), Toy(torch.float64)
    for tokens in (batch_of(1), batch_of(2)):
        nn.functional.cross_entropy(plain(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    strategy = adapters_alone()
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.0)
    train(model, strategy, optimizer, range(1, 2))
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.dense_weight(), plain.get_parameter(f"{name}.weight"))
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    train(model, strategy, optimizer, range(2, 3))
    assert len(layers_of(model)) == 3
    for name, layer in layers_of(model).items():
        assert isinstance(layer, LoRASBLinear) and layer.gradient is None
        original = plain.get_parameter(f"{name}.weight")
        assert original.grad is not None
        left, values, right = torch.linalg.svd(-0.02 * original.grad.sign(), full_matrices=False)
        best = left[:, :3] * values[:3] @ right[:3]
        torch.testing.assert_close((layer.left @ layer.core @ layer.right).detach(), best, atol=1e-12, rtol=0)
        torch.testing.assert_close(layer.core.detach(), values[:3].diag(), atol=1e-12, rtol=0)
        assert torch.equal(layer.weight, original)
        assert [key for key, param in layer.named_parameters() if param.requires_grad and key != "bias"] == ["core"]
        assert not optimizer.state.get(layer.core)  # Adam begins anew with C


def test_only_c_moves_afterwards() -> None:
    model, strategy = Toy(), row("lora_sb").strategy()
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.02)
    train(model, strategy, optimizer, range(1, 3))
    begun = copy.deepcopy(model.state_dict())
    train(model, strategy, optimizer, range(3, 9))
    for name in layers_of(model):
        now = model.state_dict()
        keys = [
            key
            for key in ("weight", "left", "core", "right")
            if not torch.equal(now[f"{name}.{key}"], begun[f"{name}.{key}"])
        ]
        assert keys == ["core"]


def test_only_training_is_watched() -> None:
    layer = LoRASBLinear.from_linear(linear_of((20, 12)), rank=3)
    assert isinstance(layer, LoRASBLinear) and layer.gradient is not None
    x = torch.ones(2, 3, 12, dtype=torch.float64)
    layer.eval()(x).sum().backward()
    assert not layer.gradient.any()
    for _ in range(2):  # two micro-batches are added up
        layer.train()(x).sum().backward()
    assert torch.equal(layer.gradient, torch.full((20, 12), 12.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"strategy\.weights\.rank is 0"):
        LoRASBLinear.from_linear(linear_of((20, 12)), rank=0)
