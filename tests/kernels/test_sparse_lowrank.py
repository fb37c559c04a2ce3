"""Both orders of SLTrain's product against plain autograd through the dense matrix, and what they keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_train.kernels import sparse_lowrank
from lowrank_train.kernels.sparse_lowrank import dense_matrix, is_factored, sparse_lowrank_linear

SHAPES = [(20, 7, 3), (6, 17, 2), (9, 9, 9), (1, 13, 1), (33, 5, 4)]  # rows, columns, rank
ORDERS = pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
SPARSE = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products on the CPU need MKL")


def operands(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random ones, with a fifth of the entries in S and the first and the last among them."""
    generator = torch.Generator().manual_seed(rows)
    total = rows * columns
    drawn = torch.randperm(total, generator=generator)[: max(2, total // 5)]
    index = torch.cat((drawn, torch.tensor([0, total - 1]))).unique().int()
    shapes = {"first": (rank, columns), "second": (rows, rank), "values": (len(index),), "scale": (1,), "bias": (rows,)}
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return {name: value.requires_grad_() for name, value in made.items()} | {"index": index}


@pytest.fixture
def order(factored: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    if factored and not torch.backends.mkl.is_available():
        pytest.skip("sparse products on the CPU need MKL")
    monkeypatch.setattr(sparse_lowrank, "is_factored", lambda *_: factored)
    return factored


@ORDERS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_dense_product_and_so_are_its_gradients(order: bool, shape: tuple[int, int, int]) -> None:
    """More tokens than a block of them, not a multiple of it; 1e-11: float64 sums of 600 products of size 1."""
    tensors = operands(*shape)
    x = torch.randn(2, 300, shape[1], dtype=torch.float64, requires_grad=True)
    toward = torch.randn(2, 300, shape[0], dtype=torch.float64)
    results = []
    for way in ("ours", "plain"):
        given = {name: value.detach().clone().requires_grad_() for name, value in tensors.items() if name != "index"}
        index, start = tensors["index"], x.detach().clone().requires_grad_()
        if way == "ours":
            out = sparse_lowrank_linear(start, **given, index=index)
        else:
            sparse = torch.zeros(shape[0] * shape[1], dtype=torch.float64).scatter(0, index.long(), given["values"])
            weight = given["scale"] * given["second"] @ given["first"] + sparse.view(shape[0], shape[1])
            out = F.linear(start, weight, given["bias"])
        out.backward(toward)
        results.append({"out": out.detach(), "x": start.grad, **{name: value.grad for name, value in given.items()}})
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, atol=1e-11, rtol=1e-11, msg=name)


@ORDERS
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradcheck(order: bool, shape: tuple[int, int, int]) -> None:
    tensors = operands(*shape)
    x = torch.randn(4, shape[1], dtype=torch.float64, requires_grad=True)
    index = tensors["index"]

    def call(x: Tensor, first: Tensor, second: Tensor, scale: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_lowrank_linear(x, first, second, scale, values, index, bias)

    assert torch.autograd.gradcheck(call, (x, *(tensors[n] for n in ("first", "second", "scale", "values", "bias"))))


@ORDERS
def test_a_number_as_scale_no_bias_frozen_operands_and_a_long_index(order: bool) -> None:
    tensors = operands(8, 6, 2)
    tensors["index"] = tensors["index"].long()
    x = torch.randn(5, 6, dtype=torch.float64)
    first, second, values = tensors["first"].detach(), tensors["second"], tensors["values"]
    out = sparse_lowrank_linear(x, first, second, 0.25, values, tensors["index"], None)
    expected = x @ dense_matrix(0.25 * first, second, values, tensors["index"]).T
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-13)  # sums of 6 numbers in float64
    out.square().sum().backward()
    of_weight = (2 * expected.T @ x).detach()
    torch.testing.assert_close(second.grad, 0.25 * of_weight @ first.T, atol=1e-12, rtol=1e-12)  # of 30 products
    torch.testing.assert_close(values.grad, of_weight.flatten()[tensors["index"]], atol=1e-12, rtol=1e-12)


@SPARSE
def test_the_factored_order_holds_no_matrix_of_the_weight_size() -> None:
    """Neither in forward nor in backward: no allocation is as large as W, which here is larger than x and y."""
    rows, columns, tokens = 600, 700, 300
    tensors = operands(rows, columns, 4, torch.float32)
    x = torch.randn(tokens, columns, requires_grad=True)
    assert is_factored(x, tensors["first"], tensors["second"], tensors["index"][:1000])
    tensors |= {"index": tensors["index"][:1000], "values": tensors["values"].detach()[:1000].requires_grad_()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sparse_lowrank_linear(x, **tensors).sum().backward()
    results = profile.profiler.kineto_results
    assert results is not None
    largest = max(event.nbytes() for event in results.events() if event.name() == "[memory]")
    assert tokens * columns * 4 <= largest < rows * columns * 4


@ORDERS
def test_keeps_nothing_but_its_operands_for_backward(order: bool) -> None:
    tensors = operands(20, 7, 3)
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        sparse_lowrank_linear(x, **tensors)
    given = {tensor.data_ptr() for tensor in (x, *tensors.values())}
    assert {tensor.data_ptr() for tensor in kept} <= given
    assert kept


def test_which_order_serves_what() -> None:
    """Factored where the factors are thin and the entries few, in a dtype and on tensors that MKL's kernels take."""
    first, second, few = torch.zeros(16, 4096), torch.zeros(4096, 16), torch.zeros(8, dtype=torch.int32)
    x = torch.zeros(64, 4096)
    assert is_factored(x, first, second, few) == torch.backends.mkl.is_available()
    assert not is_factored(x.bfloat16(), first, second, few)
    assert not is_factored(x.to("meta"), first, second, few)
    assert not is_factored(x, first, second, torch.zeros(4096 * 2048, dtype=torch.int32))
    assert not is_factored(x[:, :64], first[:, :64], second[:64], few)
    with FakeTensorMode():
        assert not is_factored(x, first, second, torch.zeros(8, dtype=torch.int32))


def test_bfloat16_follows_float32() -> None:
    """2^-8 is one rounding of bfloat16; the sums have 64 terms of size 1, and W and the product are rounded."""
    tensors = operands(16, 12, 2, torch.float32)
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        given = {n: v.detach().to(dtype).requires_grad_() for n, v in tensors.items() if n != "index"}
        out = sparse_lowrank_linear(x.to(dtype), **given, index=tensors["index"])
        out.float().square().mean().backward()
        assert all(value.grad is not None and value.grad.dtype == dtype for value in given.values())
        results.append([out.detach().float(), *(value.grad.float() for value in given.values())])  # type: ignore[union-attr]
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).norm() <= 4 * 2**-8 * expected.norm()


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_that_of_the_parameters() -> None:
    tensors = operands(16, 12, 2, torch.float32)
    x = torch.randn(64, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparse_lowrank_linear(x, **tensors)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for n, t in tensors.items() if n != "index")
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_runs_on_tensors_without_numbers(mode: str) -> None:
    """Forward and backward, for whoever counts memory without spending any."""
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        index = torch.empty(100, dtype=torch.int32)
        shapes = {"first": (4, 600), "second": (500, 4), "values": (100,), "scale": (1,), "bias": (500,)}
        tensors = {name: torch.empty(shape, requires_grad=True) for name, shape in shapes.items()}
        x = torch.empty(2, 1000, 600, requires_grad=True)
        out = sparse_lowrank_linear(x, **tensors, index=index)
        out.sum().backward()
    assert out.shape == (2, 1000, 500)
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(value.grad is not None and value.grad.shape == value.shape for value in tensors.values())


def test_compiles_as_one_graph() -> None:
    """The compiler gets the dense order; 1e-4: float32 sums in another order, of 1000 products of size 1."""
    tensors = operands(64, 48, 4, torch.float32)
    x = torch.randn(1000, 48)
    compiled = torch.compile(sparse_lowrank_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **tensors), sparse_lowrank_linear(x, **tensors), atol=1e-4, rtol=1e-4)
    compiled(x, **tensors).sum().backward()
    found = tensors["values"].grad
    expected = torch.autograd.grad(sparse_lowrank_linear(x, **tensors).sum(), tensors["values"])[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
