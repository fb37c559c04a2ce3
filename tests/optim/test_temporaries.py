"""Rules that go through a matrix a few rows at a time: the same numbers, and no temporary as large as the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.rows import peak_extra_bytes
from lowrank_train.optim.adafactor import Adafactor
from lowrank_train.optim.adam_atan2 import AdamAtan2
from lowrank_train.optim.adam_mini import AdamMini
from lowrank_train.optim.flora import Flora
from lowrank_train.optim.transform import Rates, Slot, State, Transform

RATES = Rates(1e-2, 1e-2)
RULES: dict[str, Transform] = {
    "adafactor": Adafactor(),
    "adafactor-beta1": Adafactor(beta1=0.9, scale_parameter=True),
    "flora": Flora(rank=4, kappa=3),
    "flora-whole-moment": Flora(rank=10**6),
    "flora-no-moment": Flora(rank=4, beta1=None, clip_threshold=0.3),
    "adam_mini": AdamMini(),
    "adam_atan2": AdamAtan2(),
}
SHAPES = [(24, 12), (12, 24), (16, 16), (13, 7), (2, 3, 4), (11,)]  # tall, wide, square, odd, a stack, a vector


def in_pieces_of(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_train.kernels.pieces.PIECE_ELEMENTS", {"cpu": elements, "cuda": elements})


def begun(rule: Transform, param: Tensor) -> State:
    return rule.init(param, Slot("w", 3, 0.0, param.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rows_in_turn_are_the_whole(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-13: sums over columns and norms are taken in another order; eight updates of float64."""
    moved = []
    for elements in (2**20, 20):
        in_pieces_of(elements, monkeypatch)
        generator = torch.Generator().manual_seed(0)
        param = torch.randn(shape, generator=generator, dtype=torch.float64)
        state = begun(RULES[name], param)
        for _ in range(8):
            grad = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            RULES[name].apply(grad, state, param, RATES, 1e-3)
        moved.append(param)
    torch.testing.assert_close(*moved, rtol=1e-13, atol=1e-13)


def clipped(update: Tensor, threshold: float) -> Tensor:
    return update / max(1.0, update.square().mean().sqrt().item() / threshold)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_floras_norm_without_its_update_is_the_norm(shape: tuple[int, int]) -> None:
    """Whole matrices by the paper's formula, clipped at nearly every update, with a transfer at the third and sixth."""
    rule, generator = (
        Flora(rank=4, kappa=3, scale_parameter=False, clip_threshold=0.3),
        torch.Generator().manual_seed(1),
    )
    param, adafactor = torch.zeros(shape, dtype=torch.float64), Adafactor(clip_threshold=1e9)
    state, second = begun(rule, param), begun(adafactor, param)
    moment: Any = 0.0
    left = shape[0] < shape[1]

    def projection() -> Tensor:
        drawn = rule._projection(state, param, 0).double()
        return drawn.T if left else drawn

    for step in range(1, 8):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        basis = projection()
        found = rule.update(grad.clone(), state, param, RATES).tensor()
        u = adafactor.update(grad, second, param, RATES).tensor()
        up = (basis @ moment if left else moment @ basis.T) if step > 1 else torch.zeros_like(u)
        torch.testing.assert_close(found, clipped(0.1 * u + 0.9 * up, 0.3), rtol=1e-12, atol=1e-12)
        if step % 3 == 0:
            basis = projection()
            moment = basis.T @ up if left else up @ basis
        moment = 0.9 * moment + 0.1 * (basis.T @ u if left else u @ basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_nothing_as_large_as_the_matrix(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most six float32 pieces of 1/32 of the matrix, and what Flora has of its moment's size, 1/64 of it each."""
    in_pieces_of(2**12, monkeypatch)
    param = torch.randn(512, 256).to(dtype)
    rule, state = RULES[name], begun(RULES[name], param)
    grad = torch.randn(512, 256).to(dtype)
    rule.apply(grad, state, param, RATES)
    extra = peak_extra_bytes(lambda: rule.apply(grad, state, param, RATES))
    assert 0 < extra < param.numel() * 4 * (6 / 32 + 6 / 64)
