"""A matrix in 8-bit codes that stands for a parameter: products, gradients, bytes, unbiased rounding, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.kernels.pieces import PIECE_ELEMENTS

SHAPES = [(48, 16), (16, 48), (32, 32), (7, 13), (3, 5461), (1, 1)]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coded(values: Tensor, group: int = 64) -> Int8Weight:
    param = nn.Parameter(Int8Weight.of(values, group=group))
    assert isinstance(param, Int8Weight)
    return param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_products_and_gradients_are_those_of_the_decoded_matrix(
    shape: tuple[int, int], leading: tuple[int, ...], biased: bool
) -> None:
    """In float64, where sums of up to 5461 terms in any order agree to 1e-11 of their size."""
    weight = coded(numbers(*shape, dtype=torch.float64))
    dense = weight.decoded().detach().double().requires_grad_()
    bias = numbers(shape[0], seed=1, dtype=torch.float64) if biased else None
    grad = numbers(*leading, shape[0], seed=2, dtype=torch.float64)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for matrix, results in ((weight, found), (dense, expected)):
        x = numbers(*leading, shape[1], seed=3, dtype=torch.float64).requires_grad_()
        out = F.linear(x, matrix, bias)
        out.backward(grad)
        assert x.grad is not None and matrix.grad is not None
        results += [out.detach(), x.grad, matrix.grad]
    assert type(weight.grad) is Tensor and weight.grad.dtype is torch.float64
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_frozen_matrix_keeps_no_input_and_gets_no_gradient() -> None:
    weight = coded(numbers(8, 16)).requires_grad_(False)
    kept: list[Tensor] = []
    x = numbers(3, 16, seed=1).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.linear(x, weight).sum().backward()
    assert sum(tensor.nbytes for tensor in kept) == 8 * 16 + 2 * 5
    assert weight.grad is None and x.grad is not None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_codes_are_all_that_is_kept(shape: tuple[int, int]) -> None:
    """1 byte a number, 5 a group; on meta too."""
    numel = shape[0] * shape[1]
    for device in ("cpu", "meta"):
        weight = Int8Weight.of(torch.zeros(shape, dtype=torch.bfloat16, device=device), group=64)
        assert sum(part.nbytes for part in weight.parts().values()) == numel + 5 * -(-numel // 64)
        assert (weight.shape, weight.dtype, weight.device.type) == (torch.Size(shape), torch.bfloat16, device)


@pytest.mark.parametrize("ends", ["both signs", "positive", "negative"])
def test_rounding_at_random_is_unbiased_to_the_ends_of_a_group(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean error of each of 128 numbers over 2,500 writes, in steps of its group.

    A write is off by at most one step, with a variance p (1 - p) of at most 1/4: 5 standard deviations for the worst
    number, 4 for the mean of them all, which is smaller by the root of their number. Written in pieces of a group.
    """
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 64)
    values = numbers(2, 64)
    values = {"both signs": values, "positive": values.abs() + 3, "negative": -values.abs() - 3}[ends]
    weight, draws = Int8Weight.of(values, group=64), 2_500
    total = torch.zeros(2, 64, dtype=torch.float64)
    for draw in range(draws):
        weight.store_(values, seed=draw * 64)  # pieces draw from the seeds beside it
        total += weight.decoded()
    error = (total / draws - values) / weight.scale[:, None]
    deviation = 0.5 / draws**0.5
    assert error.abs().max() < 5 * deviation
    assert error.mean().abs() < 4 * deviation / values.numel() ** 0.5
    assert error.abs().max() > 0


def test_rounding_to_the_nearest_is_within_half_a_step_and_repeats_itself() -> None:
    values = numbers(7, 301)
    weight = Int8Weight.of(values, group=256)
    decoded = weight.decoded()
    weight.store_(decoded)
    torch.testing.assert_close(weight.decoded(), decoded, rtol=1e-5, atol=1e-6)
    steps = weight.scale.repeat_interleave(256)[: values.numel()].view(7, 301)
    assert ((decoded - values).abs() <= steps * 1.0001).all()  # at the ends the rounded zero costs up to another half
    torch.testing.assert_close(weight.steps() * steps, weight.decoded())


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest, where no seed tells them apart; the last group and the last piece are shorter."""
    values, weight = numbers(9, 101, seed=1), Int8Weight.of(numbers(9, 101), group=64)
    weight.store_(values)
    whole = weight.codes.clone()
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 200)
    weight.store_(torch.zeros(9, 101))
    weight.store_(values)
    assert torch.equal(weight.codes, whole)


def test_what_does_not_need_numbers_is_not_decoded_and_what_would_write_is_refused() -> None:
    weight = coded(numbers(6, 50))
    for made in (torch.zeros_like(weight), torch.empty_like(weight, device="meta"), weight.detach().new_zeros(2, 3)):
        assert type(made) is Tensor and made.dtype is torch.float32
    twin = copy.deepcopy(weight)
    assert isinstance(twin, Int8Weight) and isinstance(twin, nn.Parameter) and twin.requires_grad
    assert twin.codes.data_ptr() != weight.codes.data_ptr()
    with torch.no_grad():
        for write in (lambda: weight.add_(1.0), lambda: weight.mul_(2.0), lambda: torch.zeros(6, 50, out=weight)):
            with pytest.raises((NotImplementedError, TypeError)):
                write()
        assert torch.equal(twin.codes, weight.codes)
        other = Int8Weight.of(numbers(6, 50, seed=1), group=64)
        weight.copy_(other)
    assert all(torch.equal(part, other.parts()[name]) for name, part in weight.parts().items())
    torch.testing.assert_close(weight.detach() + 0, other.decoded())


def test_a_copy_of_its_own_numbers_changes_no_code() -> None:
    """Encoding them anew would: at random, the ends of a group are not always at the ends of the codes."""
    values = numbers(6, 50)
    weight = Int8Weight.of(values.to(torch.bfloat16), group=64)
    weight.store_(values, seed=3)
    before = {name: part.clone() for name, part in weight.parts().items()}
    weight.copy_(weight.to(torch.float32).to(torch.bfloat16))
    assert all(torch.equal(part, before[name]) for name, part in weight.parts().items())
    weight.store_(weight.decoded())
    assert not all(torch.equal(part, before[name]) for name, part in weight.parts().items())
