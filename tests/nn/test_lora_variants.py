"""LoRA with a mixer, gates, blocks, masks or a rank that is drawn, against the matrices they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_train.nn.allora import ALLoRALinear
from lowrank_train.nn.between import MoSLoRALinear, SoRA, SoRALinear
from lowrank_train.nn.dylora import DyLoRALinear
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.nn.lora_ggpo import LoRAGGPOLinear, noise
from lowrank_train.nn.patterned_lora import CapaBoostLinear, MELoRALinear
from lowrank_train.nn.reparam import layers_of
from tests.nn.methods import Toy
from tests.nn.test_lora import linear_of, row

SHAPES = [(20, 12), (8, 20), (16, 16)]  # (out, in): tall, wide, square; multiples of 4 for MELoRA's blocks


def filled(layer: LoRALinear) -> LoRALinear:
    """With random numbers in everything that is trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for param in layer.parameters():
            if param.requires_grad and param is not layer.bias:
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    return layer


def assert_computes(layer: LoRALinear, update: Tensor) -> None:
    """1e-12: float64 sums of at most 20 terms."""
    torch.testing.assert_close(layer.update_of_weight().detach(), update.detach(), atol=1e-12, rtol=1e-12)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, layer.weight + update, layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moslora_mixes_the_components(shape: tuple[int, int]) -> None:
    """s times the sum over i, j of M_ij b_i a_j^T; M begins uniform in +-1/sqrt(rank)."""
    begun = MoSLoRALinear.from_linear(linear_of(shape), rank=4, alpha=6.0)
    assert isinstance(begun, MoSLoRALinear)
    assert 0.2 < begun.mixer.abs().max() <= 0.5 and not begun.update_of_weight().any()
    layer = filled(begun)
    update = torch.zeros(shape, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            update += 1.5 * begun.mixer[i, j] * torch.outer(layer.B[:, i], layer.A[j])
    assert_computes(layer, update)


@pytest.mark.parametrize("shape", [*SHAPES, (7, 13)], ids=str)
def test_allora_scales_the_gradient_of_each_row(shape: tuple[int, int]) -> None:
    """A and B learn from G_i / sqrt(|(B A)_i| + 1 / eta^2), G the gradient of the product; x gets it unscaled.

    eta = 6 / 3, and row 0 of B is 0: it learns twice as fast. 1e-12: float64 sums of at most 20 terms."""
    layer = ALLoRALinear.from_linear(linear_of(shape), rank=3, alpha=6.0)
    assert isinstance(layer, ALLoRALinear)
    filled(layer)
    with torch.no_grad():
        layer.B[0] = 0.0
    assert_computes(layer, layer.B @ layer.A)
    x, grad = (
        torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        for size in shape[::-1]
    )
    layer.train()(x.requires_grad_()).backward(grad)
    with torch.no_grad():
        product = layer.B @ layer.A
        of_product = grad.flatten(0, 1).T @ x.flatten(0, 1)
        factors = 1 / (torch.linalg.vector_norm(product, dim=1) + 0.25).sqrt()
        assert factors[0] == 2
        scaled = factors[:, None] * of_product
        for found, expected in (
            (layer.A.grad, layer.B.T @ scaled),
            (layer.B.grad, scaled @ layer.A.T),
            (x.grad, grad @ (layer.weight + product)),
        ):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_allora_computes_under_autocast() -> None:
    """The product is in bfloat16, the factors and their gradients in float32; 3 bits of the mantissa are lost twice."""
    layer = ALLoRALinear.from_linear(linear_of((20, 12), torch.float32), rank=3, alpha=6.0)
    with torch.no_grad():
        layer.get_parameter("lora_B").normal_(generator=torch.Generator().manual_seed(2))
    x, grads = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)), []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(x).float().square().sum().backward()
        grads.append([layer.get_parameter(name).grad for name in ("lora_A", "lora_B")])
    for exact, rough in zip(*grads, strict=True):
        assert exact is not None and rough is not None and rough.dtype == torch.float32
        assert (rough - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("shape", [*SHAPES, (7, 13)], ids=str)
def test_ggpo_adds_noise_as_large_as_weights_and_gradients(shape: tuple[int, int]) -> None:
    """The norms are those of the dense matrices; the noise is the same in forward and backward, other for each update,
    and gone in evaluation. 1e-12: float64 sums of at most 20 terms."""
    layer = LoRAGGPOLinear.from_linear(linear_of(shape), rank=3, alpha=6.0, sigma=0.5, beta=0.2, name="a")
    assert isinstance(layer, LoRAGGPOLinear)
    filled(layer)
    assert_computes(layer, 2 * layer.B @ layer.A)
    x, grad = (
        torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        for size in shape[::-1]
    )
    eye, seen = torch.eye(shape[1], dtype=torch.float64), []
    for number in (1, 2):
        layer.zero_grad()
        for rows in x:  # two micro-batches of an update
            inside = rows.clone().requires_grad_()
            layer.train()(inside).backward(grad[0])
            noisy = layer(eye).detach().T  # W + E, column by column
            torch.testing.assert_close(inside.grad, grad[0] @ noisy, atol=1e-12, rtol=1e-12)
        seen.append(noisy - layer.dense_weight().detach())
        assert layer.A.grad is not None and layer.B.grad is not None
        of_product = 2 * (layer.B @ layer.A.grad + layer.B.grad @ layer.A).detach()
        layer.renew_noise_(number)
        norms = (torch.linalg.vector_norm(matrix, dim=1) for matrix in (layer.dense_weight().detach(), of_product))
        expected = sum(factor * norm for factor, norm in zip((0.5, 0.2), norms, strict=True)) / math.sqrt(shape[0])
        torch.testing.assert_close(layer.deviations, expected, atol=1e-12, rtol=1e-12)
    assert not torch.equal(seen[0], seen[1]) and not layer.seen_A.any()


def test_ggpos_noise_is_normal_and_follows_from_the_name() -> None:
    """Over 40,000 numbers: mean 0 and deviation 1 within 5 standard errors, none beyond 4.3, which 16 bits allow."""
    deviations, blocks = torch.linspace(1, 2, 200, dtype=torch.float64), []
    for place, rows in noise(deviations, 200, seed=3):
        blocks.append(rows / deviations[place, None])
    numbers = torch.cat(blocks)
    assert numbers.shape == (200, 200) and abs(numbers.mean()) < 0.025 and abs(numbers.std() - 1) < 0.018
    assert abs((numbers.abs() < 1).double().mean() - 0.6827) < 0.012 and numbers.abs().max() < 4.4
    first, second = (LoRAGGPOLinear.from_linear(linear_of((20, 12)), rank=3, name=name) for name in "ab")
    x = torch.ones(1, 12, dtype=torch.float64)
    assert not torch.equal(first.train()(x) - first.eval()(x), second.train()(x) - second.eval()(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sora_weighs_the_components(shape: tuple[int, int]) -> None:
    layer = SoRALinear.from_linear(linear_of(shape), rank=3, alpha=6.0)
    assert isinstance(layer, SoRALinear)
    filled(layer)
    update = sum(2.0 * layer.gate[i] * torch.outer(layer.B[:, i], layer.A[i]) for i in range(3))
    assert isinstance(update, Tensor)
    assert_computes(layer, update)


def test_sora_shrinks_its_gates_and_closes_the_small_ones() -> None:
    """By lambda = 0.3 towards 0: also between lambda and 2 lambda, where the published code closes them at once."""
    layer = SoRALinear.from_linear(linear_of((20, 12)), rank=6, threshold=0.3)
    assert isinstance(layer, SoRALinear)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([1.0, -1.0, 0.45, -0.45, 0.29, 0.0], dtype=torch.float64))
    layer.shrink_()
    expected = torch.tensor([0.7, -0.7, 0.15, -0.15, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(layer.gate.detach(), expected, atol=1e-12, rtol=0)
    [event] = SoRA(rank=3).events()
    assert event.due(1) and event.due(2)
    assert [one.first for one in SoRA(rank=3, warm_start_steps=4).events()] == [4, 5]  # no gates before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_melora_is_block_diagonal(shape: tuple[int, int]) -> None:
    """Four blocks B_i A_i, each from its part of the inputs to its part of the outputs: rank 4 * 2 with the numbers of
    a LoRA of rank 2, where the sides allow it."""
    layer = MELoRALinear.from_linear(linear_of(shape), rank=2, alpha=3.0, minis=4)
    assert isinstance(layer, MELoRALinear)
    assert layer.A.abs().max() <= math.sqrt(4 / shape[1])  # as A of a LoRA with a quarter of the inputs
    assert layer.A.abs().max() > 0.8 * math.sqrt(4 / shape[1])
    filled(layer)
    update = torch.zeros(shape, dtype=torch.float64)
    m, n = shape[0] // 4, shape[1] // 4
    for i in range(4):
        block = 1.5 * layer.B[i * m : (i + 1) * m] @ layer.A[:, i * n : (i + 1) * n]
        update[i * m : (i + 1) * m, i * n : (i + 1) * n] = block
    assert_computes(layer, update)
    assert torch.linalg.matrix_rank(update) == 8
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * sum(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_capaboost_adds_masked_copies(shape: tuple[int, int]) -> None:
    """Each mask keeps int(0.4 entries), no two are the same, and three copies of rank 2 have rank 6."""
    layer = CapaBoostLinear.from_linear(linear_of(shape), rank=2, alpha=3.0, copies=3, density=0.4, name="a")
    assert isinstance(layer, CapaBoostLinear)
    assert layer.mask_A.flatten(1).sum(1).tolist() == [int(0.4 * 2 * shape[1])] * 3
    assert layer.mask_B.flatten(1).sum(1).tolist() == [int(0.4 * 2 * shape[0])] * 3
    assert len({tuple(mask.flatten().tolist()) for mask in layer.mask_A}) == 3
    other = CapaBoostLinear.from_linear(linear_of(shape), rank=2, copies=3, density=0.4, name="b")
    assert isinstance(other, CapaBoostLinear) and not torch.equal(other.mask_B, layer.mask_B)
    filled(layer)
    update = torch.zeros(shape, dtype=torch.float64)
    for of_b, of_a in zip(layer.mask_B.double(), layer.mask_A.double(), strict=True):
        update += 1.5 * (layer.B * of_b) @ (layer.A * of_a)
    assert_computes(layer, update)
    assert torch.linalg.matrix_rank(update) == 6


@pytest.mark.parametrize("used", [None, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dylora_has_the_drawn_rank_in_training_and_the_chosen_one_after(
    shape: tuple[int, int], used: int | None
) -> None:
    layer = DyLoRALinear.from_linear(linear_of(shape), rank=5, alpha=3.0, used_rank=used)
    assert isinstance(layer, DyLoRALinear)
    filled(layer)
    x = torch.randn(4, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = set()
    for number in range(1, 40):
        layer.draw_(number)
        width = int(layer.width)
        seen.add(width)
        expected = F.linear(x, layer.weight + 3.0 / width * layer.B[:, :width] @ layer.A[:width])
        torch.testing.assert_close(layer.train()(x), expected, atol=1e-12, rtol=1e-12)
    assert seen == {1, 2, 3, 4, 5}
    rank = used or 5
    assert_computes(layer, 3.0 / rank * layer.B[:, :rank] @ layer.A[:rank])


def test_dylora_draws_one_rank_for_all_layers_and_frozen_teaches_one_component() -> None:
    strategy = row("dylora_frozen").strategy()
    model = Toy(torch.float64)
    strategy.prepare(model)
    layers = [layer for layer in layers_of(model).values() if isinstance(layer, DyLoRALinear)]
    for number in range(1, 6):
        for layer in layers:
            filled(layer)
            layer.draw_(number)
        assert len({int(layer.width) for layer in layers}) == 1
        layer, width = layers[0], int(layers[0].width)
        layer.zero_grad()
        layer.train()(torch.ones(1, layer.in_features, dtype=torch.float64)).sum().backward()
        assert layer.A.grad is not None and layer.B.grad is not None
        assert layer.A.grad.any(dim=1).nonzero().flatten().tolist() == [width - 1]
        assert layer.B.grad.any(dim=0).nonzero().flatten().tolist() == [width - 1]


def test_a_loaded_dylora_goes_on_with_its_rank() -> None:
    first, second = (DyLoRALinear.from_linear(linear_of((8, 8)), rank=8) for _ in range(2))
    assert isinstance(first, DyLoRALinear) and isinstance(second, DyLoRALinear)
    number = next(n for n in range(1, 50) if first._drawn(n) != first._width)
    first.draw_(number)
    filled(first)
    second.load_state_dict(first.state_dict())
    x = torch.ones(1, 8, dtype=torch.float64)
    assert torch.equal(second.train()(x), first.train()(x))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (MoSLoRALinear, {"init": "pissa"}, "init is pissa, but the update of MoSLoRA is not B A"),
        (ALLoRALinear, {"alpha": 0.0}, r"alpha is 0\.0"),
        (LoRAGGPOLinear, {"sigma": -0.1}, r"sigma is -0\.1"),
        (LoRAGGPOLinear, {"train_a": False}, "train_a is false, but LoRA-GGPO needs"),
        (SoRALinear, {"threshold": -0.1}, r"threshold is -0\.1"),
        (MELoRALinear, {"minis": 3}, "minis is 3, which does not divide both sides of 20 x 12"),
        (MELoRALinear, {"rank": 4, "minis": 4}, "rank is 4, above the short side of the 4 blocks of 20 x 12"),
        (CapaBoostLinear, {"density": 0.0}, r"density is 0\.0"),
        (CapaBoostLinear, {"copies": 0}, "copies is 0"),
        (DyLoRALinear, {"least_rank": 9}, "least_rank is 9"),
        (DyLoRALinear, {"used_rank": 9}, "used_rank is 9"),
        (DyLoRALinear, {"rslora": True}, "rslora: DyLoRA's factor is alpha / b"),
    ],
)
def test_bad_values_are_named(kind: type[LoRALinear], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy\.weights\.{words}"):
        kind.from_linear(linear_of((20, 12)), **options)
