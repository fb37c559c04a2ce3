"""Adapters between rows and columns of W0, and LoRAs between frozen factors, against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.from_columns import PMSS, IntTune, NLoRA, pivots
from lowrank_train.nn.nested_lora import LoRAMini, NestedLoRA, NestedLoRALinear, NoRA
from lowrank_train.nn.reparam import Origin
from lowrank_train.nn.three_factors import ThreeFactorsLinear
from tests.nn.test_lora import SHAPES, linear_of


def trained_names(layer: nn.Module) -> list[str]:
    return [name for name, param in layer.named_parameters() if param.requires_grad and name != "bias"]


@pytest.mark.parametrize("shape", [*SHAPES, (30, 7)], ids=str)
def test_pivots_are_those_of_qr_with_column_pivoting(shape: tuple[int, int]) -> None:
    """Against the definition with orthogonal projectors in numpy: the column with most left outside the chosen ones."""
    matrix = np.random.default_rng(2).normal(size=shape) * np.linspace(1, 3, shape[1])
    chosen: list[int] = []
    for _ in range(5):
        basis = np.linalg.qr(matrix[:, chosen])[0] if chosen else np.zeros((shape[0], 0))
        left = np.linalg.norm(matrix - basis @ (basis.T @ matrix), axis=0)
        left[chosen] = -1
        chosen.append(int(left.argmax()))
    assert pivots(torch.from_numpy(matrix), 5).tolist() == chosen
    flat = torch.ones(4, 3)
    assert sorted(pivots(flat, 3).tolist()) == [0, 1, 2]  # rank 1: the rest are any


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pmss_stands_between_a_skeleton(shape: tuple[int, int]) -> None:
    linear = linear_of(shape)
    original = linear.weight.detach().clone()
    layer = PMSS(rank=3, alpha=2.0).layer(linear, Origin())
    assert isinstance(layer, ThreeFactorsLinear) and trained_names(layer) == ["core"]
    assert torch.equal(layer.left, original[:, pivots(original, 3)])
    assert torch.equal(layer.right, original[pivots(original.T, 3)])
    assert torch.equal(layer.dense_weight(), original)
    with torch.no_grad():
        layer.core.copy_(torch.arange(9).view(3, 3))
    expected = original + 2 * layer.left @ layer.core @ layer.right
    torch.testing.assert_close(layer.dense_weight(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nlora_is_nystroems_approximation(shape: tuple[int, int]) -> None:
    """Of a matrix of rank 3 it is the matrix itself, so that W' is 0; of any other, the layer begins as it was."""
    drawn = torch.Generator().manual_seed(3)
    product = torch.randn(shape[0], 3, generator=drawn, dtype=torch.float64) @ torch.randn(
        3, shape[1], generator=drawn, dtype=torch.float64
    )
    linear = linear_of(shape)
    original = linear.weight.detach().clone()
    layer = NLoRA(rank=3).layer(linear, Origin())
    assert isinstance(layer, ThreeFactorsLinear) and trained_names(layer) == ["left", "core", "right"]
    torch.testing.assert_close(layer.dense_weight(), original, atol=1e-12, rtol=0)
    assert torch.equal(layer.left, original[:, :3]) and torch.equal(layer.right, original[:3])
    with torch.no_grad():
        linear.weight.copy_(product)
    exact = IntTune(rank=3).layer(linear, Origin())
    assert isinstance(exact, ThreeFactorsLinear) and trained_names(exact) == ["core"]
    assert exact.weight.abs().max() < 1e-9 * product.abs().max()  # the corner's condition number times rounding


@pytest.mark.parametrize("choice", [NoRA(rank=2, outer_rank=5), LoRAMini(rank=2, outer_rank=5)], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_nested_lora_is_a_lora_of_products(choice: NestedLoRA, shape: tuple[int, int]) -> None:
    linear = linear_of(shape)
    original = linear.weight.detach().clone()
    layer = choice.layer(linear, Origin("layer", 4))
    assert isinstance(layer, NestedLoRALinear) and trained_names(layer) == ["lora_A", "lora_B"]
    assert torch.equal(layer.dense_weight(), original)
    assert sum(layer.get_parameter(name).numel() for name in trained_names(layer)) == 2 * 2 * 5
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(5))
    update = 8.0 * layer.left @ layer.lora_B @ layer.lora_A @ layer.right
    torch.testing.assert_close(layer.dense_weight(), original + update, atol=1e-12, rtol=0)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T, atol=1e-10, rtol=0)
    if isinstance(choice, NoRA):
        left, values, right = np.linalg.svd(original.numpy(), full_matrices=False)
        best = torch.from_numpy(left[:, :5] * values[:5] @ right[:5])
        torch.testing.assert_close(layer.left @ layer.right, best, atol=1e-12, rtol=0)
        balance: Tensor = (
            layer.left.T @ layer.left - layer.right @ layer.right.T
        )  # the root of each value on either side
        assert balance.abs().max() < 1e-12


def test_wrong_ranks_are_refused() -> None:
    for choice, fault in (
        (lambda: NoRA(rank=9, outer_rank=8), "rank is 9, above strategy.weights.outer_rank"),
        (lambda: LoRAMini(rank=0), "rank is 0; it must be at least 1"),
        (lambda: NoRA(rank=2, outer_rank=13).layer(linear_of((20, 12)), Origin()), "outer_rank is 13, above"),
        (lambda: PMSS(rank=13).layer(linear_of((20, 12)), Origin()), "rank is 13, above the short side"),
    ):
        with pytest.raises(ValueError, match=fault.replace(".", r"\.")):
            choice()
