"""Adapters of three factors from W0 against decompositions of numpy or by hand, whatever the signs of vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.lamda import LaMDA, LaMDALinear
from lowrank_train.nn.reparam import Origin, layers_of
from lowrank_train.nn.three_factors import SORSA, CURLoRA, LoLDU, LoRAXS, SVFit, ThreeFactors, ThreeFactorsLinear
from tests.nn.methods import Toy, train
from tests.nn.test_lora import SHAPES, linear_of
from tests.nn.test_lora import row as row_of

RANK = 3


def built(choice: ThreeFactors, shape: tuple[int, int], name: str = "") -> tuple[ThreeFactorsLinear, Tensor]:
    """A layer, and the matrix it was built from."""
    linear = linear_of(shape)
    original = linear.weight.detach().clone()
    layer = choice.layer(linear, Origin(name, seed=3))
    assert isinstance(layer, ThreeFactorsLinear)
    return layer, original


def svd(matrix: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix.numpy(), full_matrices=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_xs_stands_between_the_leading_vectors(shape: tuple[int, int]) -> None:
    """L R is the best approximation of rank 3, the singular values are in R, which x meets first, and W0 stays; C is
    drawn from N(0, 1e-10). 1e-12: float64 decompositions of matrices of norm about 3."""
    layer, original = built(LoRAXS(rank=RANK, alpha=6.0), shape)
    left, values, right = svd(original)
    best = torch.from_numpy(left[:, :RANK] * values[:RANK] @ right[:RANK])
    torch.testing.assert_close(layer.left @ layer.right, best, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.right.norm(dim=1), torch.from_numpy(values[:RANK]), atol=1e-12, rtol=0)
    assert torch.equal(layer.weight, original)
    assert layer.core.all() and 2e-6 < layer.core.std() < 3e-5
    with torch.no_grad():
        layer.core.copy_(torch.eye(RANK))
    torch.testing.assert_close(layer.dense_weight(), original + 2.0 * best, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_curlora_stands_between_columns_and_rows(shape: tuple[int, int]) -> None:
    layer, original = built(CURLoRA(rank=RANK, alpha=2.0), shape)
    columns = [next(j for j in range(shape[1]) if torch.equal(column, original[:, j])) for column in layer.left.T]
    rows = [next(i for i in range(shape[0]) if torch.equal(row, original[i])) for row in layer.right]
    assert torch.equal(layer.dense_weight(), original)
    with torch.no_grad():
        layer.core.copy_(torch.arange(9).view(3, 3))
    expected = original.clone()
    for k, column in enumerate(columns):
        for j, row in enumerate(rows):
            expected += 2.0 * (3 * k + j) * torch.outer(original[:, column], original[row])
    torch.testing.assert_close(layer.dense_weight(), expected, atol=1e-12, rtol=0)


def test_curlora_draws_what_matters_least() -> None:
    """2,400 draws of columns against 1 / (p + 0.001): each share within 5 standard deviations, sqrt(q (1 - q) / n)."""
    weight = torch.tensor([[0.1, 1.0, 0.0], [0.0, 2.0, 0.2], [0.1, 0.0, 0.4]], dtype=torch.float64)
    shares = weight.square().sum(0) / weight.square().sum()
    odds = 1 / (shares + 0.001)
    odds /= odds.sum()
    counts = torch.zeros(3)
    for draw in range(800):
        left, _, _ = CURLoRA(rank=3).factors(weight, Origin(f"layer {draw}"))
        for column in left.T:
            counts[next(j for j in range(3) if torch.equal(column, weight[:, j]))] += 1
    for count, odd in zip(counts.tolist(), odds.tolist(), strict=True):
        assert abs(count / 2400 - odd) < 5 * (odd * (1 - odd) / 2400) ** 0.5


@pytest.mark.parametrize("choice", [SVFit(rank=RANK), SORSA(rank=RANK), SORSA(rank=RANK, alpha=6.0)], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_singular_values_are_taken_out_and_moved_alone(choice: SVFit, shape: tuple[int, int]) -> None:
    """With c + 1 in place of c the leading singular values grow by s, and the vectors are what they were. With s = 2
    the residual is W0 - 2 U_r S_r V_r^T, as published."""
    layer, original = built(choice, shape)
    left, values, right = svd(original)
    best = torch.from_numpy(left[:, :RANK] * values[:RANK] @ right[:RANK])
    torch.testing.assert_close(layer.weight.detach(), original - choice.scale * best, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.core.detach(), torch.from_numpy(values[:RANK].copy()), atol=1e-12, rtol=0)
    with torch.no_grad():
        layer.core.add_(1.0)
    values[:RANK] += choice.scale
    torch.testing.assert_close(layer.dense_weight(), torch.from_numpy(left * values @ right), atol=1e-12, rtol=0)


class Rate:
    """The memory of an optimizer whose learning rate is 0.1."""

    def forget(self, param: nn.Parameter) -> None:
        raise AssertionError

    def mask(self, param: nn.Parameter, keep: Callable[[str, Tensor], Tensor]) -> None:
        raise AssertionError

    def lr(self, param: nn.Parameter) -> float:
        return 0.1


@pytest.mark.parametrize("one_by_one", [False, True])
def test_sorsa_pulls_along_the_gradient_of_the_mean_norm(one_by_one: bool) -> None:
    """Against autograd on the mean over all L and R of both layers, after they have left orthonormality; also where the
    layers come one by one, as they do from shards."""
    choice = SORSA(rank=RANK, orthonormal=0.5)
    model = nn.ModuleDict({"tall": nn.Linear(12, 20), "wide": nn.Linear(20, 8)}).double()
    choice.swap_(model, ["tall", "wide"], seed=0)
    layers = {name: layer for name, layer in model.items() if isinstance(layer, ThreeFactorsLinear)}
    generator = torch.Generator().manual_seed(0)
    factors = [factor for layer in layers.values() for factor in (layer.left, layer.right)]
    with torch.no_grad():
        for factor in factors:
            factor.add_(0.3 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    identity = torch.eye(RANK, dtype=torch.float64)
    grams = [factor.T @ factor if factor.shape[1] == RANK else factor @ factor.T for factor in factors]
    mean = torch.stack([torch.linalg.matrix_norm(gram - identity) for gram in grams]).mean()
    grads = torch.autograd.grad(mean, factors)
    expected = [factor.detach() - 0.1 * 0.5 * grad for factor, grad in zip(factors, grads, strict=True)]
    [event] = choice.events()
    assert event.due(1) and event.due(2)
    with torch.no_grad():
        for part in [{name: layer} for name, layer in layers.items()] if one_by_one else [layers]:
            event.run(1, part, Rate())
    for factor, moved in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.detach(), moved, atol=1e-12, rtol=0)
    assert SORSA(rank=RANK, orthonormal=0.0).events() == ()


def leading_triangles(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """P L_r diag(d_r) U_r and d_r by elimination with partial pivoting: each step takes out an outer product."""
    rest, total, pivots = matrix.clone(), torch.zeros_like(matrix), []
    for column in range(RANK):
        row = int(rest[:, column].abs().argmax())
        taken = torch.outer(rest[:, column] / rest[row, column], rest[row])
        pivots.append(rest[row, column].clone())
        rest, total = rest - taken, total + taken
    return total, torch.stack(pivots)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loldu_takes_out_the_leading_part_of_the_triangles(shape: tuple[int, int]) -> None:
    """W' = W0 - s P L_r diag(d_r) U_r; c and s scale it."""
    layer, original = built(LoLDU(rank=RANK, alpha=6.0), shape)
    part, pivots = leading_triangles(original)
    torch.testing.assert_close(layer.weight.detach(), original - 2.0 * part, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.right.diagonal(), torch.ones(RANK, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.core.detach(), pivots, atol=1e-12, rtol=0)
    assert layer.gain is not None
    with torch.no_grad():
        layer.gain.fill_(3.0)
    torch.testing.assert_close(layer.dense_weight(), original + part, atol=1e-12, rtol=0)


def test_loldu_begins_at_a_singular_matrix_too() -> None:
    linear = linear_of((12, 8))
    with torch.no_grad():
        linear.weight[:, :2] = 0.0
    original = linear.weight.detach().clone()
    layer = LoLDU(rank=RANK, alpha=3.0).layer(linear, Origin())
    torch.testing.assert_close(layer.dense_weight(), original, atol=1e-12, rtol=0)


@pytest.mark.parametrize("choice", [SVFit(rank=RANK), LoLDU(rank=RANK, alpha=3.0)], ids=repr)
def test_in_bfloat16_the_start_lacks_only_what_the_residual_rounds(choice: SVFit) -> None:
    """Nearest: half a bfloat16 step of W', 2^-9 of an entry below 1 in size; compensated: 2^-16."""
    for rounding, tolerance in (("nearest", 2**-9), ("compensated", 2**-16)):
        choice.rounding = rounding  # type: ignore[assignment]
        linear = linear_of((20, 12), dtype=torch.bfloat16)
        original = linear.weight.detach().float()
        layer = choice.layer(linear, Origin())
        torch.testing.assert_close(layer.dense_weight(), original, atol=tolerance, rtol=0)
        assert layer.core.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha is 0"), ({"orthonormal": -1.0}, "orthonormal is -1")],
)
def test_bad_values_are_named(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy\.weights\.{words}"):
        SORSA(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lamda_begins_between_halves_of_the_leading_part(shape: tuple[int, int]) -> None:
    """With s = 2, s L R is the best approximation of rank 3, each of L and R has half of it, and W' lacks it; a random
    start leaves W0 whole."""
    layer, original = built(LaMDA(rank=RANK, alpha=6.0, stages=2), shape)
    left, values, right = svd(original)
    best = torch.from_numpy(left[:, :RANK] * values[:RANK] @ right[:RANK])
    torch.testing.assert_close(2 * layer.whole_left() @ layer.right, best, atol=1e-12, rtol=0)
    halves = torch.from_numpy(values[:RANK] / 2)
    torch.testing.assert_close(layer.whole_left().square().sum(0), halves, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.right.square().sum(1), halves, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.weight.detach(), original - best, atol=1e-12, rtol=0)
    assert torch.equal(layer.core, torch.eye(RANK, dtype=torch.float64))
    random, original = built(LaMDA(rank=RANK, init="random", stages=1), shape)
    assert torch.equal(random.dense_weight(), original) and torch.equal(random.weight, original)
    assert 0.5 < random.core.abs().max() * 3**0.5 <= 1 and 0.9 < random.right.abs().max() * shape[1] ** 0.5 <= 1


def test_lamda_freezes_its_columns_in_stages_and_frees_their_moments() -> None:
    """5 columns in 2 stages over 30 % of 20 updates: 3 of them after the third, all after the sixth."""
    choice = LaMDA(rank=5, stages=2)
    choice.set_length(20)
    assert [event.first for event in choice.events()] == [3, 6]
    given = LaMDA(rank=5, stages=3, freeze_steps=2)
    given.set_length(20)
    assert [event.first for event in given.events()] == [1, 2, 2]
    method = row_of("lamda")
    strategy, model = method.strategy(weights=method.weights | {"rank": 5, "freeze_steps": 6}), Toy()
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.02)
    begun = {name: layer.whole_left().clone() for name, layer in layers_of(model).items()}  # type: ignore[operator]
    columns: dict[str, list[Tensor]] = {name: [value] for name, value in begun.items()}

    def after(step: int) -> None:
        for name, layer in layers_of(model).items():
            assert isinstance(layer, LaMDALinear)
            columns[name].append(layer.whole_left().detach().clone())
            trained = [group in optimizer.state for group in layer.columns]
            assert trained == [step < 3, step < 6] == [group.requires_grad for group in layer.columns]

    train(model, strategy, optimizer, range(1, 10), after)
    for history in columns.values():
        moved = [(now != before).any(dim=0).tolist() for before, now in itertools.pairwise(history)]
        assert moved == [[True] * 5] * 3 + [[False] * 3 + [True] * 2] * 3 + [[False] * 5] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, r"alpha is 0\.0"),
        ({"freeze_share": 0.0}, r"freeze_share is 0\.0"),
        ({"freeze_share": 1.5}, r"freeze_share is 1\.5"),
        ({"freeze_steps": 0}, "freeze_steps is 0"),
        ({"rank": 4, "stages": 5}, "stages is 5"),
    ],
)
def test_bad_values_of_lamda_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy\.weights\.{words}"):
        LaMDA(**options)
    with pytest.raises(ValueError, match="freeze_steps is null, and the length of the run is not known"):
        LaMDA().events()
