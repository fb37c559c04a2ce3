"""Block-diagonal factors against the dense matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.config import compose
from lowrank_train.models import meta_model
from lowrank_train.nn.reparam import ReparamLinear, layers_of
from lowrank_train.nn.structured import BlockDense, BlockDenseLinear, BlockShuffle, BlockShuffleLinear
from lowrank_train.strategy import Strategy

SHAPES = [(24, 12), (12, 24), (12, 12), (36, 12), (12, 60)]


def built(
    kind: type[ReparamLinear], shape: tuple[int, int], dtype: torch.dtype = torch.float64, **options: object
) -> ReparamLinear:
    torch.manual_seed(shape[0])
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    return kind.from_linear(linear, name="layer", seed=3, **options)


def shuffle(size: int, blocks: int) -> Tensor:
    """P with (P x)[l (size / b) + s] = x[s b + l]: the l-th block gets every b-th number."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for s in range(size // blocks):
        for block in range(blocks):
            matrix[block * (size // blocks) + s, s * blocks + block] = 1
    return matrix


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_shuffle_is_two_block_diagonals_and_two_permutations(shape: tuple[int, int], blocks: int) -> None:
    """W = P' diag(L2) P diag(L1) written out, with P' = P^T of the output's size; forward, dense weight and gradients
    to 1e-12 in float64 (the sheet asks for 1e-6)."""
    layer = built(BlockShuffleLinear, shape, blocks=blocks)
    assert isinstance(layer, BlockShuffleLinear) and layer.bias is not None
    with torch.no_grad():
        layer.L1.add_(torch.randn_like(layer.L1))
        layer.L2.add_(torch.randn_like(layer.L2))
    first, second = (one.detach().clone().requires_grad_() for one in (layer.L1, layer.L2))
    weight = (
        shuffle(shape[0], blocks).T @ torch.block_diag(*second) @ shuffle(min(shape), blocks) @ torch.block_diag(*first)
    )
    torch.testing.assert_close(layer.dense_weight(), weight, atol=1e-12, rtol=0)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64)
    expected = x @ weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    layer(x).sin().sum().backward()
    expected.sin().sum().backward()
    for one, other in zip((layer.L1.grad, layer.L2.grad), (first.grad, second.grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    if blocks**2 <= min(shape):  # then each block of L2 sees every block of L1
        assert (weight != 0).all()


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_dense_is_a_dense_times_a_block_diagonal_matrix(shape: tuple[int, int], blocks: int) -> None:
    """W = L2 block_diag(L1) written out; 1e-12 in float64."""
    layer = built(BlockDenseLinear, shape, rank=6, blocks=blocks)
    assert isinstance(layer, BlockDenseLinear) and layer.bias is not None
    weight = layer.L2 @ torch.block_diag(*layer.L1)
    torch.testing.assert_close(layer.dense_weight(), weight, atol=1e-12, rtol=0)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_begin_orthogonal(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """All singular values of every block are 1; float64's 1e-12 holds 24 products of rounding 1e-16."""
    dense = built(BlockDenseLinear, shape, dtype, rank=6, blocks=2)
    shuffled = built(BlockShuffleLinear, shape, dtype, blocks=3)
    for factor in (dense.L1, dense.L2, shuffled.L1, shuffled.L2):
        assert isinstance(factor, Tensor)
        values = torch.linalg.svdvals(factor.detach())
        torch.testing.assert_close(values, torch.ones_like(values), atol=tolerance, rtol=0)
    assert not torch.equal(shuffled.L1[0], shuffled.L1[1])  # type: ignore[index]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_guide_begins_as_the_product_with_its_shuffles(shape: tuple[int, int]) -> None:
    """So that a guided layer begins as an unguided one; 1e-12 in float64."""
    x = torch.randn(5, shape[1], dtype=torch.float64)
    for kind, options in ((BlockShuffleLinear, {"blocks": 3}), (BlockDenseLinear, {"rank": 6, "blocks": 2})):
        alone, guided = built(kind, shape, **options), built(kind, shape, guided_steps=5, **options)
        assert isinstance(guided.guide, nn.Parameter)
        torch.testing.assert_close(guided(x), alone(x), atol=1e-12, rtol=0)
        torch.testing.assert_close(guided.guide.detach(), alone.dense_weight().detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("choice", ["lowrank", "block_dense", "block_shuffle"])
@pytest.mark.parametrize("size", ["60m", "350m", "7b"])
def test_sizes_are_the_closed_forms(size: str, choice: str) -> None:
    """r (m + n), r n / b + m r and k n / b + m k / b numbers a matrix of the MLP of every layer but the first, which
    stays dense like attention."""
    config = compose(["strategy=structured_ffn", f"strategy/weights={choice}", f"model=llama_{size}", "task=explain"])
    model = meta_model(config.model, vocab_size=32000)
    shapes = [m.weight.shape for n, m in model.named_modules() if ".mlp." in n and isinstance(m, nn.Linear)][3:]
    others = sum(param.numel() for param in model.parameters()) - sum(shape.numel() for shape in shapes)
    Strategy.from_config(config.strategy).prepare(model)
    rank, wide_blocks, blocks = 128, 2, 4
    count = {
        "lowrank": lambda m, n: rank * (m + n),
        "block_dense": lambda m, n: rank * n // wide_blocks + m * rank,
        "block_shuffle": lambda m, n: min(m, n) * n // blocks + m * min(m, n) // blocks,
    }[choice]
    assert sum(param.numel() for param in model.parameters()) == others + sum(count(m, n) for m, n in shapes)
    swapped = layers_of(model)
    assert len(swapped) == len(shapes)
    assert not [name for name in swapped if "layers.0." in name or "self_attn" in name]


def test_misfits_and_bad_values_are_named() -> None:
    for options in ({"rank": 0}, {"blocks": 0}, {"rank": 7, "blocks": 2}, {"guided_steps": -1}):
        with pytest.raises(ValueError, match=rf"strategy\.weights\.{next(iter(options))}"):
            BlockDense(**options)
    with pytest.raises(ValueError, match=r"strategy\.weights\.blocks is 0"):
        BlockShuffle(blocks=0)
    assert "does not divide the input's size 21" in str(BlockDense(rank=4, blocks=2).misfit((30, 21)))
    assert "above the short side" in str(BlockDense(rank=64, blocks=2).misfit((30, 40)))
    assert "does not divide both of 30 x 21" in str(BlockShuffle(blocks=2).misfit((30, 21)))
    assert BlockShuffle(blocks=2).misfit((30, 22)) is None
