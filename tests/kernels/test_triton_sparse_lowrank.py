"""SLTrain's product by kernels, forward and all gradients, against the same through the dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels import sparse_lowrank
from tests.kernels.triton_runs import DEVICE, INTERPRETED, TOLERANCE, needs_device, numbers, there

pytest.importorskip("triton")

import lowrank_train.kernels.triton.sparse_lowrank
from lowrank_train.kernels.triton.sparse_lowrank import (
    FEW_TOKENS,
    dense_matrix,
    row_begins,
    sampled_product,
    sparse_lowrank_product,
)

pytestmark = needs_device
# Rows, columns, rank: one tile and several each way, more than one tile of the rank, nothing a multiple of anything.
SHAPES = [(150, 41, 5), (30, 141, 40), (64, 128, 16), (1, 9, 1)]
DTYPES = [torch.float32, torch.bfloat16]
SHARES = pytest.mark.parametrize("share", [0.03, 1.0])


def operands(shape: tuple[int, int, int], share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s A, B, the values of S and their ascending flat indices, the first and the last place of W among them."""
    rows, columns, rank = shape
    total = rows * columns
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(1))[: int(share * total)]
    index = torch.cat((drawn, torch.tensor([0, total - 1]))).unique().int()
    factors = numbers(rank, columns, seed=2, dtype=dtype), numbers(rows, rank, seed=3, dtype=dtype) * rank**-0.5
    return *factors, numbers(len(index), seed=4, dtype=dtype), index


def exact(scaled: Tensor, second: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W in float32, from operands as they are."""
    return sparse_lowrank.dense_matrix(scaled.float(), second.float(), values.float(), index)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Sums of up to 200 numbers of the size of one, in another order, beside the tolerance of the dtype."""
    torch.testing.assert_close(
        got.cpu(),
        expected.to(got.dtype),
        rtol=TOLERANCE[got.dtype]["rtol"],
        atol=2e-5 if got.dtype.itemsize > 2 else 1e-2,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHARES
def test_matrix(shape: tuple[int, int, int], dtype: torch.dtype, share: float) -> None:
    given = operands(shape, share, dtype)
    assert_close(dense_matrix(*map(there, given)), exact(*given))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "share"), [(1, 1.0), (37, 0.03)])
@pytest.mark.parametrize("input_gradient", [False, True])
def test_product(
    shape: tuple[int, int, int], dtype: torch.dtype, tokens: int, input_gradient: bool, share: float
) -> None:
    given = operands(shape, share, dtype)
    weight = exact(*given).to(dtype).float()
    x = numbers(tokens, shape[0] if input_gradient else shape[1], seed=5, dtype=dtype) * shape[1] ** -0.5
    bias = None if input_gradient else numbers(shape[0], seed=6, dtype=dtype)
    expected = x.float() @ weight if input_gradient else x.float() @ weight.T + bias.float()  # type: ignore[union-attr]
    placed = [there(one) for one in given]
    got = sparse_lowrank_product(there(x), *placed, None if bias is None else there(bias), input_gradient)
    assert_close(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHARES
def test_sampled_product(shape: tuple[int, int, int], dtype: torch.dtype, share: float) -> None:
    index = operands(shape, share, dtype)[3]
    grad, x = numbers(70, shape[0], seed=5, dtype=dtype) * 0.1, numbers(70, shape[1], seed=6, dtype=dtype)
    got = sampled_product(there(grad), there(x), there(index))
    assert_close(got, (grad.float().T @ x.float()).flatten()[index])


def test_row_begins() -> None:
    """With rows that have no entry, the first and the last among them."""
    index = torch.tensor([3, 5, 9, 10, 11], dtype=torch.int32)
    assert row_begins(index, 5, 3).tolist() == [0, 0, 2, 2, 5, 5]


@pytest.mark.parametrize("tokens", [20, FEW_TOKENS + 9], ids=["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("long_index", [False, True])
def test_layer_and_its_gradients(
    tokens: int, dtype: torch.dtype, long_index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the public operation, which few tokens take without any matrix of the size of W."""
    shape = (70, 45, 6)
    if INTERPRETED:
        monkeypatch.setattr("lowrank_train.kernels.dispatch.has_kernels", lambda device: True)
    calls: list[str] = []
    kernels = lowrank_train.kernels.triton.sparse_lowrank
    for name in ("dense_matrix", "sparse_lowrank_product", "sampled_product"):
        original = getattr(kernels, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counted)
    first, second, values, index = operands(shape, 0.1, dtype)
    given = {"first": first, "second": second, "values": values, "bias": numbers(70, seed=7, dtype=dtype)}
    x, toward = numbers(2, tokens // 2, 45, seed=5, dtype=dtype), numbers(2, tokens // 2, 70, seed=6, dtype=dtype)
    results = []
    for place in (DEVICE, None):
        wide = torch.float32 if place is None else dtype
        leaves = {name: value.to(place or "cpu", wide, copy=True).requires_grad_() for name, value in given.items()}
        start, scale = x.to(place or "cpu", wide, copy=True).requires_grad_(), torch.full((1,), 0.5, dtype=wide)
        scale = scale.to(place or "cpu").requires_grad_()
        if place is None:
            monkeypatch.setattr("lowrank_train.kernels.dispatch.has_kernels", lambda device: False)
        where = (index.long() if long_index else index).to(place or "cpu")
        out = sparse_lowrank.sparse_lowrank_linear(start, **leaves, scale=scale, index=where)
        out.backward(toward.to(out))
        results.append([out.detach(), start.grad, scale.grad, *(leaf.grad for leaf in leaves.values())])
    for got, expected in zip(*results, strict=True):
        assert got is not None and expected is not None and got.dtype == dtype
        difference = (got.float().cpu() - expected).norm() / expected.norm()
        assert difference < (2e-6 if dtype is torch.float32 else 1e-2)  # of bfloat16: three roundings by 2^-9
    if tokens <= FEW_TOKENS:
        assert calls == ["sparse_lowrank_product", "sparse_lowrank_product", "sampled_product"]
    else:
        assert calls == ["dense_matrix", "dense_matrix"]
