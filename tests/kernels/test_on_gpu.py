"""On a GPU, at the sizes of LLaMA 7B: every kernel by its public operation, against the reference on the same card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.adam_8bit import adam_8bit_step
from lowrank_train.kernels.affine import dequantize_affine, quantize_affine
from lowrank_train.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lowrank_train.kernels.int8_linear import int8_linear
from lowrank_train.kernels.int8_update import int8_update_
from lowrank_train.kernels.lifted_update import Residual, lifted_update_
from lowrank_train.kernels.projected_adam import projected_adam
from lowrank_train.kernels.sparse_lowrank import sparse_lowrank_linear
from lowrank_train.kernels.unit_columns import unit_columns_
from tests.kernels.triton_runs import DEVICE, INTERPRETED

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from tests.kernels.compile_kernels import kernels

# Under the interpreter, which takes milliseconds a tile, the same code on a matrix of some tiles.
ROWS, COLUMNS, RANK = (96, 160, 24) if INTERPRETED else (4096, 11008, 1024)
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Case:
    """An operation that launches these kernels, and by how much its results may differ, as a share of their norm."""

    run: Callable[[], list[Tensor]]
    kernels: tuple[str, ...]
    apart: float


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def codes_of(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    return quantize_blockwise(moment, signed=signed)


def decoded(codes: tuple[Tensor, Tensor], signed: bool) -> Tensor:
    return dequantize_blockwise(*codes, signed=signed)


def blockwise() -> list[Tensor]:
    values = normal(ROWS, COLUMNS)
    return [decoded(codes_of(values, True), True), decoded(codes_of(values.square(), False), False)]


def affine() -> list[Tensor]:
    values = normal(ROWS, COLUMNS)
    return [dequantize_affine(quantize_affine(values, bits=bits), values.shape, bits=bits) for bits in (4, 8)]


def adam_of_codes() -> list[Tensor]:
    param, low = normal(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS, device=DEVICE)
    first, second = codes_of(low, True), codes_of(low, False)
    for step in range(3):
        adam_8bit_step(param, normal(ROWS, COLUMNS, seed=step), first, second, step_size=0.1, betas=BETAS, eps=1e-3)
    return [param, decoded(first, True), decoded(second, False)]


def projection_side(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, basis, and the shape of the small gradient."""
    basis = normal(COLUMNS if side == "right" else ROWS, RANK, seed=1, dtype=torch.float32) * RANK**-0.5
    low = torch.zeros((ROWS, RANK) if side == "right" else (RANK, COLUMNS), device=DEVICE)
    return normal(ROWS, COLUMNS), basis, low


def projected_step(side: str, coded: bool) -> list[Tensor]:
    grad, basis, low = projection_side(side)
    first, second = (codes_of(low, True), codes_of(low, False)) if coded else (low.clone(), low.clone())
    param = normal(ROWS, COLUMNS, seed=2)
    before = param.clone()
    for _ in range(2):
        made = projected_adam(
            grad,
            basis,
            first,
            second,
            side=side,
            betas=BETAS,
            eps=1e-3,
            keep_low=True,  # type: ignore[arg-type]
        )
        assert made.low is not None
        residual = Residual(grad, -0.01, line=torch.full((ROWS, 1), 0.5, device=DEVICE))
        lifted_update_(param, made.direction, basis, side=side, factor=-0.1, residual=residual, seed=3)  # type: ignore[arg-type]
    return [param.float() - before.float(), made.low, made.norm]


def update_of_codes() -> list[Tensor]:
    weight = quantize_affine(normal(ROWS, COLUMNS), bits=8)
    int8_update_(weight, normal(ROWS, COLUMNS, seed=1), factor=-0.1, decay=0.1, seed=5)
    return [dequantize_affine(weight, (ROWS, COLUMNS), bits=8)]


def linear_of_codes() -> list[Tensor]:
    weight, x = quantize_affine(normal(ROWS, COLUMNS), bits=8), normal(300, COLUMNS).requires_grad_()
    out = int8_linear(x, weight, (ROWS, COLUMNS))
    out.backward(normal(300, ROWS, seed=1))
    assert x.grad is not None
    return [out.detach(), x.grad]


def sltrain(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(ROWS * COLUMNS, (ROWS * COLUMNS // 30,), generator=generator).unique().int().to(DEVICE)
    first, second = normal(RANK, COLUMNS, seed=1).requires_grad_(), normal(ROWS, RANK, seed=2).requires_grad_()
    values, x = normal(len(index), seed=3).requires_grad_(), normal(tokens, COLUMNS, seed=4).requires_grad_()
    out = sparse_lowrank_linear(x, first, second, 0.1, values, index, None)
    out.backward(normal(tokens, ROWS, seed=5))
    return [out.detach(), *(leaf.grad for leaf in (x, first, second, values) if leaf.grad is not None)]


def unit_length() -> list[Tensor]:
    matrix = normal(COLUMNS, RANK)
    unit_columns_(matrix)
    return [matrix]


CODES = ("quantize_blockwise_kernel", "dequantize_blockwise_kernel")
AFFINE = ("quantize_affine_kernel", "dequantize_affine_kernel")
STEP = ("projected_adam_kernel", "lifted_update_kernel")
ONE_CODE, BFLOAT16 = 2e-3, 1e-2  # a code now and then its neighbour, 1 % away; some roundings by 2^-9
CASES = {
    "8-bit moments": Case(blockwise, CODES, ONE_CODE),
    "affine codes": Case(affine, AFFINE, ONE_CODE),
    "8-bit Adam": Case(adam_of_codes, ("adam_8bit_step_kernel", *CODES), BFLOAT16),
    "projected step, right": Case(lambda: projected_step("right", coded=False), STEP, BFLOAT16),
    "projected step, left": Case(lambda: projected_step("left", coded=False), STEP, BFLOAT16),
    "projected step, 8 bits, right": Case(lambda: projected_step("right", coded=True), STEP, BFLOAT16),
    "projected step, 8 bits, left": Case(lambda: projected_step("left", coded=True), STEP, BFLOAT16),
    "int8 weights, updated": Case(update_of_codes, ("int8_update_kernel", *AFFINE), ONE_CODE),
    "int8 weights, multiplied": Case(linear_of_codes, ("int8_product_kernel",), BFLOAT16),
    "SLTrain, few tokens": Case(
        lambda: sltrain(100), ("sparse_lowrank_product_kernel", "sampled_product_kernel"), BFLOAT16
    ),
    "unit columns": Case(unit_length, ("unit_columns_kernel",), BFLOAT16),
    "SLTrain, many tokens": Case(lambda: sltrain(1000), ("dense_matrix_kernel",), BFLOAT16),
}


def test_no_kernel_is_left_out() -> None:
    assert {name for case in CASES.values() for name in case.kernels} == set(kernels())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_its_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, launched, run = CASES[name], set(), JITFunction.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_train.kernels.dispatch.has_kernels", lambda device: False)
        expected = case.run()

    def recorded(self: JITFunction, *args: object, **kwargs: object) -> object:
        launched.add(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", recorded)
    for got, one in zip(case.run(), expected, strict=True):
        assert got.dtype == one.dtype and one.float().norm() > 0
        assert (got.float() - one.float()).norm() <= case.apart * one.float().norm()
    assert set(case.kernels) <= launched
