"""FedPara and LoHa against the explicit Hadamard product: output, gradients, what backward keeps, starts, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.loha import FedParaLinear, LoHaLinear
from tests.nn.test_lora import SHAPES, linear_of, saved_elements

X = torch.randn(5, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def built(kind: type[FedParaLinear], linear: nn.Linear, rank: int = 1) -> FedParaLinear:
    """A layer all of whose factors are random."""
    options: dict[str, Any] = {"rank": rank} | ({"alpha": 3.0} if kind is LoHaLinear else {})
    layer = kind.from_linear(linear, **options)
    assert isinstance(layer, FedParaLinear)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for factor in layer.factors:
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [FedParaLinear, LoHaLinear])
def test_output_and_gradients_are_those_of_the_explicit_product(
    kind: type[FedParaLinear], shape: tuple[int, int]
) -> None:
    """W = [W0 + (alpha / r)] (B1 A1) * (B2 A2), as in peft's LoHa, through autograd; 1e-12 for float64 sums."""
    layer = built(kind, linear_of(shape, bias=True))
    x = X[..., : shape[1]].clone().requires_grad_()

    def formula(x: Tensor) -> Tensor:
        product = (layer.B1 @ layer.A1) * (layer.B2 @ layer.A2)
        weight = layer.weight + 3.0 * product if isinstance(layer, LoHaLinear) else product
        return F.linear(x, weight, layer.bias)

    assert layer.bias is not None
    trained = [x, *layer.factors, layer.bias]
    pull = torch.randn(5, 3, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), formula(x), atol=1e-12, rtol=1e-12)
    found = torch.autograd.grad((layer(x) * pull).sum(), trained)
    expected = torch.autograd.grad((formula(x) * pull).sum(), trained)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", [FedParaLinear, LoHaLinear])
def test_gradients_by_finite_differences(kind: type[FedParaLinear]) -> None:
    """torch's gradcheck, which knows nothing of the formula; a token without batch dimension among the shapes."""
    layer = built(kind, linear_of((6, 9)), rank=1)
    for x in (X[0, :, :9], X[0, 0, :9]):
        assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x.clone().requires_grad_(), *layer.factors))


@pytest.mark.parametrize("kind", [FedParaLinear, LoHaLinear])
def test_backward_keeps_the_input_and_nothing_of_the_size_of_the_weight(kind: type[FedParaLinear]) -> None:
    layer = kind.from_linear(linear_of((96, 64), torch.float32), rank=4)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert saved_elements(layer, x) == x.numel()


def test_a_bfloat16_forward_inside_float32_weights_has_wide_gradients() -> None:
    """Mixed precision: the products run in bfloat16, 2^-8 each, and gradients come back in float32."""
    layer = built(LoHaLinear, linear_of((20, 12)), rank=1).float()
    x = X[..., :12].float().requires_grad_()
    exact = torch.autograd.grad(layer(x).square().sum(), [x, *layer.factors])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    found = torch.autograd.grad(y.float().square().sum(), [x, *layer.factors])
    assert y.dtype is torch.bfloat16
    for one, other in zip(found, exact, strict=True):
        assert one.dtype is torch.float32
        assert (one - other).norm() <= 0.03 * other.norm()


def test_product_of_rank_r_has_rank_r_squared() -> None:
    """r = 4 is enough for full rank 16; smallest singular values are some 1e-2, not rounding (1e-13)."""
    layer = built(FedParaLinear, linear_of((40, 16)), rank=4)
    assert torch.linalg.matrix_rank(layer.dense_weight()) == 16
    assert torch.linalg.matrix_rank(layer.B1 @ layer.A1) == 4


@pytest.mark.parametrize(("shape", "rank"), [((256, 192), 8), ((192, 256), 16), ((256, 256), 4)])
def test_from_scratch_the_spread_is_that_of_the_dense_matrix(shape: tuple[int, int], rank: int) -> None:
    """std(W)^2 = r^2 sigma^8 for sigma = (std(W0) / r)^(1/4). The standard error of the spread of such a product falls
    as 1/sqrt(r (m + n)): about 2 % here, so 10 %; He-normal factors would be several times off."""
    linear = linear_of(shape)
    dense = linear.weight.std().item()
    layer = FedParaLinear.from_linear(linear, rank=rank)
    assert abs(layer.dense_weight().std().item() / dense - 1) < 0.1


def test_the_adapter_begins_at_w0_and_is_not_dead() -> None:
    """B2 = 0 only: its gradient is s (G * (B1 A1)) A2^T, not zero."""
    linear = linear_of((20, 12))
    weight = linear.weight.detach().clone()
    layer = LoHaLinear.from_linear(linear, rank=2, alpha=4.0)
    assert torch.equal(layer.dense_weight(), weight)
    layer(X[..., :12]).sum().backward()
    gradients = {name: param.grad for name, param in layer.named_parameters() if param.requires_grad}
    assert {name for name, grad in gradients.items() if grad is not None and grad.any()} == {"B2"}
    for name, bound in (("A1", 12**-0.5), ("A2", 12**-0.5), ("B1", 2**-0.5)):
        drawn = layer.get_parameter(name).abs().max().item()
        assert 0.8 * bound < drawn <= bound


def test_more_numbers_than_the_matrix_are_refused() -> None:
    """2 r (m + n) <= m n: 4 for 20 x 20 has 160 numbers more than fit."""
    FedParaLinear.from_linear(linear_of((20, 20)), rank=5)
    with pytest.raises(ValueError, match=r"more numbers than the matrix itself, which is so above 5"):
        FedParaLinear.from_linear(linear_of((20, 20)), rank=6)
    with pytest.raises(ValueError, match=r"strategy\.weights\.rank is 0"):
        LoHaLinear.from_linear(linear_of((20, 20)), rank=0)
