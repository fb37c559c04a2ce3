"""The public operations call their kernels on a device that has them, and return what their references return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_train.kernels import adam_8bit, affine, blockwise, int8_linear, lifted_update, projected_adam
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.transform import Rates, Slot
from tests.kernels.triton_runs import DEVICE, INTERPRETED, assert_equal, assert_near, needs_device, numbers, there

pytest.importorskip("triton")

import lowrank_train.kernels.triton.adam_8bit
import lowrank_train.kernels.triton.affine
import lowrank_train.kernels.triton.blockwise
import lowrank_train.kernels.triton.int8_linear
import lowrank_train.kernels.triton.lifted_update
import lowrank_train.kernels.triton.projected_adam

pytestmark = needs_device


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[str]]:
    """Lets the interpreter count as a device with kernels; records the calls of a function that launches them."""
    if INTERPRETED:
        monkeypatch.setattr("lowrank_train.kernels.dispatch.has_kernels", lambda device: True)

    def record(module: Any, name: str) -> list[str]:
        calls, original = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs))
        return calls

    return record


@pytest.mark.parametrize("block", [256, 100])
def test_blockwise_codes(launched: Callable[[Any, str], list[str]], block: int) -> None:
    """Blocks that are no power of two have no kernel, and a rounding by table has none either."""
    values = numbers(3, 300)
    kernels = lowrank_train.kernels.triton.blockwise
    calls = launched(kernels, "quantize_blockwise"), launched(kernels, "dequantize_blockwise")
    codes = blockwise.quantize_blockwise(there(values), signed=True, block=block)
    expected = blockwise.quantize_blockwise_reference(values, signed=True, block=block)
    assert_equal(codes[0], expected[0])
    decoded = blockwise.dequantize_blockwise(*codes, signed=True, block=block)
    assert_equal(decoded, blockwise.dequantize_blockwise_reference(*expected, signed=True, block=block))
    assert [len(part) for part in calls] == ([1, 1] if block == 256 else [0, 0])
    blockwise.quantize_blockwise(there(values), signed=True, block=block, table=True)
    assert len(calls[0]) == (block == 256)


def test_affine_codes(launched: Callable[[Any, str], list[str]]) -> None:
    values = numbers(3, 300)
    calls = [launched(lowrank_train.kernels.triton.affine, f"{name}_affine") for name in ("quantize", "dequantize")]
    stored = affine.quantize_affine(there(values), bits=4)
    expected = affine.quantize_affine_reference(values, bits=4)
    assert_equal(stored, expected)
    decoded = affine.dequantize_affine(stored, values.shape, bits=4)
    assert_equal(decoded, affine.dequantize_affine_reference(expected, values.shape, bits=4))
    assert [len(part) for part in calls] == [1, 1]


def test_adam_step(launched: Callable[[Any, str], list[str]]) -> None:
    param, grad = numbers(2, 300), numbers(2, 300, seed=1)
    calls = launched(lowrank_train.kernels.triton.adam_8bit, "adam_8bit_step")
    results = []
    for place in (DEVICE, torch.device("cpu")):
        weight = param.to(place, copy=True)
        first, second = (
            tuple(part.to(place) for part in blockwise.quantize_blockwise_reference(torch.zeros(2, 300), signed=signed))
            for signed in (True, False)
        )
        options: dict[str, Any] = {"step_size": 0.1, "betas": (0.9, 0.99), "eps": 1e-4}
        adam_8bit.adam_8bit_step(weight, grad.to(place), first, second, **options)
        results.append(weight)
    assert_near(results[0], results[1].cpu())
    assert len(calls) == (2 if INTERPRETED else 1)


@pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.01), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize(("eps_inside", "decay_first"), [(True, True), (False, False)])
def test_stored_adam_is_one_kernel(
    launched: Callable[[Any, str], list[str]], dtype: torch.dtype, decay: float, eps_inside: bool, decay_first: bool
) -> None:
    """Three steps against the rule that decodes, updates and encodes, which rounds decayed bfloat16 weights twice."""
    rule = Stored(Adam((0.9, 0.99), 1e-4, eps_inside, decay_first), Storage(min_elements=1))
    param, rates = numbers(9, 300, dtype=dtype), Rates(0.01, 0.01)
    expected, got = param.clone(), there(param)
    states = [rule.init(one, Slot("w", 0, 0.0, torch.float32)) for one in (expected, got)]
    grads = [numbers(9, 300, seed=step, dtype=dtype) for step in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_train.kernels.dispatch.has_kernels", lambda device: False)
        for grad in grads:
            rule.apply(grad, states[0], expected, rates, decay=decay)
    calls = launched(lowrank_train.kernels.triton.adam_8bit, "adam_8bit_step")
    for grad in grads:
        rule.apply(there(grad), states[1], got, rates, decay=decay)
    assert len(calls) == 3 and states[1]["step"] == 3
    one_unit, neighbouring_code = {"rtol": 2**-7, "atol": 1e-5}, {"rtol": 1e-5, "atol": 2e-4}
    torch.testing.assert_close(got.cpu(), expected, **(one_unit if dtype is torch.bfloat16 else neighbouring_code))
    assert (got.cpu() != expected).float().mean() < 0.01 or dtype is torch.float32
    for key in ("exp_avg", "exp_avg_sq"):
        codes = [state[key + ".q8"] for state in states]
        assert (codes[0] != codes[1].cpu()).float().mean() < 2e-3


def test_int8_linear_and_its_gradient(launched: Callable[[Any, str], list[str]]) -> None:
    weight = affine.quantize_affine_reference(numbers(40, 48), bits=8)
    x, grad = numbers(2, 5, 48, seed=1), numbers(2, 5, 40, seed=2)
    calls = launched(lowrank_train.kernels.triton.int8_linear, "int8_product")
    leaf = there(x).requires_grad_()
    out = int8_linear.int8_linear(leaf, there(weight), (40, 48))
    out.backward(there(grad))
    assert len(calls) == 2
    dense = affine.dequantize_affine_reference(weight, (40, 48), bits=8)
    torch.testing.assert_close(out.detach().cpu(), x @ dense.T, rtol=1e-5, atol=1e-4)  # sums of 48 numbers of up to 10
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), grad @ dense, rtol=1e-5, atol=1e-4)


def test_projected_step(launched: Callable[[Any, str], list[str]]) -> None:
    """Both parts of it, one after the other."""
    grad, basis, param = numbers(60, 40), numbers(40, 8, seed=1), numbers(60, 40, seed=2)
    kernels = lowrank_train.kernels.triton
    calls = launched(kernels.projected_adam, "projected_adam"), launched(kernels.lifted_update, "lifted_update_")
    weight, first, second = there(param), there(torch.zeros(60, 8)), there(torch.zeros(60, 8))
    direction, low, _ = projected_adam.projected_adam(
        there(grad), there(basis), first, second, side="right", betas=(0.9, 0.99), eps=1e-3, keep_low=True
    )
    assert low is not None
    residual = lifted_update.Residual(there(grad), -0.1, low=low)
    lifted_update.lifted_update_(
        weight, direction, there(basis), side="right", factor=-0.01, residual=residual, decay=0.1
    )
    assert [len(part) for part in calls] == [1, 1]
    small = grad @ basis
    moved = (0.1 * small / ((0.01 * small.square()).sqrt() + 1e-3)) @ basis.T
    outside = grad - small @ basis.T
    expected = 0.9 * param - 0.01 * moved - 0.1 * outside.sign()
    clear = outside.abs() > 1e-4
    torch.testing.assert_close(weight.cpu()[clear], expected[clear], rtol=1e-5, atol=1e-5)
