"""MoRA's operators against index formulas: the induced matrix, its rank, rounds of ReMoRA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.mora import MoRALinear
from tests.nn.test_lora import SHAPES, linear_of

KINDS = ("sharing", "rotation")


def built(shape: tuple[int, int], operator: str, rank: int = 2, bias: bool = False) -> MoRALinear:
    """A layer with a random M."""
    layer = MoRALinear.from_linear(linear_of(shape, bias=bias), rank=rank, operator=operator)
    assert isinstance(layer, MoRALinear)
    fill(layer)
    return layer


def fill(layer: MoRALinear, seed: int = 4) -> None:
    with torch.no_grad():
        layer.M.copy_(torch.randn(layer.M.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def induced(layer: MoRALinear, kind: int = 1) -> Tensor:
    """The matrix of expand(M compress(.)), entry by entry from the paper's index formulas; `kind` of sharing, 1 to 4:
    neighbours on no side, both, the input's, the output's."""
    rows, columns, side = layer.out_features, layer.in_features, layer.side
    found = torch.zeros(rows, columns, dtype=torch.float64)
    if layer.weights.operator == "rotation":
        groups = math.ceil(columns / side)
        for row in range(rows):
            group, entry = divmod(row % (groups * side), side)
            for j in range(side):
                half = side // 2
                angle = group * 10000 ** (-2 * (j % half) / side)
                source = (group * side + j) % columns
                partner = (group * side + (j + half) % side) % columns
                found[row, source] += layer.M[entry, j].detach() * math.cos(angle)
                found[row, partner] += layer.M[entry, j].detach() * math.sin(angle) * (-1 if j < half else 1)
        return found

    def group_of(index: int, size: int, neighbours: bool) -> int:
        if not neighbours:
            return index % side
        short, longer = divmod(size, side)
        cut = longer * (short + 1)
        return index // (short + 1) if index < cut else longer + (index - cut) // short

    padded = columns if kind in (2, 3) else math.ceil(columns / side) * side
    for row in range(rows):
        target = group_of(row, rows, kind in (2, 4))
        for column in range(padded):  # published: the last group is filled up with the first features
            found[row, column % columns] += layer.M[target, group_of(column, columns, kind in (2, 3))].detach()
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 6), (5, 33)], ids=str)
def test_the_matrix_is_that_of_the_index_formulas(shape: tuple[int, int], operator: str, bias: bool) -> None:
    """1e-12: float64 sums of at most 40 terms."""
    layer = built(shape, operator, rank=1, bias=bias)
    torch.testing.assert_close(layer.update_of_weight(), induced(layer), atol=1e-12, rtol=0)
    x = torch.randn(4, 3, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, layer.weight + induced(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 6), (5, 33)], ids=str)
def test_rounds_of_sharing_take_other_groups_in_turn(shape: tuple[int, int]) -> None:
    """Types 1, 2, 3, 4, 1 of the published code; each fold keeps the matrix (1e-12, float64) and sets M to zero."""
    layer = built(shape, "sharing", rank=1)
    total = layer.weight.detach().clone()
    for number, kind in enumerate((1, 2, 3, 4, 1), start=1):
        expected = induced(layer, kind)
        torch.testing.assert_close(layer.update_of_weight(), expected, atol=1e-12, rtol=0)
        total += expected
        layer.fold_(number)
        torch.testing.assert_close(layer.weight.detach(), total, atol=1e-12, rtol=0)
        assert not layer.M.any() and layer.rounds == number
        fill(layer, seed=number)


def test_a_checkpoint_knows_its_groups() -> None:
    layer = built((20, 12), "sharing")
    layer.fold_(1)
    fill(layer)
    again = built((20, 12), "sharing")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dense_weight(), layer.dense_weight())
    assert not torch.equal(again.dense_weight(), layer.weight + induced(again))  # those of the first round


def test_ranks_of_one_round_and_of_several() -> None:
    """With 2 (32 + 32) = 128 = 11.3^2 numbers LoRA has rank 2, rotation 32, sharing r = 11; its rounds together have
    2 r - 1, since a side can only be grouped in two ways, which have the sum over all features in common."""
    assert torch.linalg.matrix_rank(built((32, 32), "rotation").update_of_weight()) == 32
    layer = built((32, 32), "sharing")
    assert layer.side == 11
    total, ranks = torch.zeros(32, 32, dtype=torch.float64), []
    for number in range(1, 5):
        total += layer.update_of_weight()
        ranks.append(int(torch.linalg.matrix_rank(total)))
        layer.fold_(number)
        fill(layer, seed=number)
    assert ranks == [11, 21, 21, 21]


def test_side_has_as_many_numbers_as_the_factors_of_lora() -> None:
    """r = sqrt((m + n) rank) to the nearest, even for rotation; and M begins at zero without being dead."""
    sharing = MoRALinear.from_linear(nn.Linear(512, 512), rank=128)
    rotation = MoRALinear.from_linear(nn.Linear(100, 69), rank=1, operator="rotation")
    assert isinstance(sharing, MoRALinear) and isinstance(rotation, MoRALinear)
    assert (sharing.side, rotation.side) == (362, 12)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    assert not sharing.M.any()
    sharing(x).square().sum().backward()
    assert sharing.M.grad is not None and sharing.M.grad.any()


def test_a_matrix_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="16 x 16, has no fewer numbers than 16 x 16 itself; below 8"):
        MoRALinear.from_linear(linear_of((16, 16)), rank=8)
    with pytest.raises(ValueError, match=r"strategy\.weights\.rank is 0"):
        MoRALinear.from_linear(linear_of((16, 16)), rank=0)
    with pytest.raises(ValueError, match=r"strategy\.weights\.dropout is 1\.5"):
        MoRALinear.from_linear(linear_of((16, 16)), dropout=1.5)
