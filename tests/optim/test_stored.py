"""State in few bits: what is stored, what it costs, what it changes, and that pieces make the whole."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.blockwise import dequantize_blockwise
from lowrank_train.kernels.pieces import PIECE_ELEMENTS
from lowrank_train.optim.adafactor import Adafactor
from lowrank_train.optim.groups import Group
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam, Lion, Momentum, RmsProp
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.subspace.randomized import Randomized
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, State, Transform, tensor_of

SHAPES = [(24, 10), (10, 24), (16, 16), (17, 9)]
SLOT = Slot("w", 3, 0.0, torch.float32)
RULES: list[Transform] = [Adam(), Adam(eps_inside=False, weight_decay_first=False), Lion(), Momentum(), RmsProp()]


def gradients(shape: tuple[int, ...], number: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(number)]


def run(rule: Transform, grads: list[Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, State]:
    param = torch.ones(grads[0].shape, dtype=dtype)
    optimizer = TransformOptimizer([Group("rest", rule, [("w", param)], [SLOT])], lr=0.1, weight_decay=0.1)
    for grad in grads:
        param.grad = grad.to(dtype).clone()
        optimizer.step()
    return param, optimizer.state[param]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_below_min_elements_nothing_changes(rule: Transform, shape: tuple[int, ...]) -> None:
    """Bit for bit, weights and state."""
    grads = gradients(shape, 5)
    plain, state = run(rule, grads)
    wrapped, same = run(Stored(rule, Storage(min_elements=10**6)), grads)
    assert torch.equal(plain, wrapped)
    assert state.keys() == same.keys()
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(same[key])) for key in state)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_the_formula(shape: tuple[int, int]) -> None:
    """One byte a number and four a block for each moment; small tensors four bytes a number."""
    numel = shape[0] * shape[1]
    for least, expected in ((1, 2 * (numel + 4 * -(-numel // 32))), (numel + 1, 8 * numel)):
        rule = Stored(Adam(), Storage(min_elements=least, block=32))
        state = rule.init(torch.empty(shape, device="meta"), SLOT)
        held = [value for value in state.values() if isinstance(value, Tensor)]
        assert sum(value.numel() * value.element_size() for value in held) == expected
        assert {value.device.type for value in held} == {"meta"}


def test_names_and_dtypes_of_state() -> None:
    state = Stored(Adam(), Storage(min_elements=1)).init(torch.empty(4, 5), SLOT)
    kinds = {key: value.dtype for key, value in state.items() if isinstance(value, Tensor)}
    eight_bit = {f"{name}.q8": torch.uint8 for name in ("exp_avg", "exp_avg_sq")}
    assert kinds == eight_bit | {f"{name}.scale": torch.float32 for name in ("exp_avg", "exp_avg_sq")}
    narrow = Slot("w", 0, 0.0, torch.bfloat16)  # what is too small for codes is not narrowed either
    small = Stored(Adam()).init(torch.empty(4, 5, dtype=torch.bfloat16), narrow)
    assert tensor_of(small, "exp_avg").dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_one_update_of_fresh_state_is_exact(shape: tuple[int, int]) -> None:
    """The update is made with new moments before they are encoded; with fresh ones nothing has been rounded yet."""
    plain, _ = run(Adam(), gradients(shape, 1))
    coded, state = run(Stored(Adam(), Storage(min_elements=1, block=64)), gradients(shape, 1))
    torch.testing.assert_close(coded, plain, rtol=1e-6, atol=1e-7)
    moments = {
        name: dequantize_blockwise(
            tensor_of(state, f"{name}.q8"), tensor_of(state, f"{name}.scale"), signed=signed, block=64
        )
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
    }
    grad = gradients(shape, 1)[0]
    for decoded, exact, bound in (
        (moments["exp_avg"], 0.1 * grad, 0.0071),
        (moments["exp_avg_sq"], 1e-3 * grad**2, 0.0036),
    ):
        assert (decoded - exact).abs().max() <= bound * exact.abs().max()


@dataclass
class Probe(Momentum):
    """Momentum that tells what it was given."""

    def update(self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None) -> Any:
        self.seen = tensor_of(state, "momentum").clone()
        return super().update(compressed, state, param, rates, grad)


def test_rule_sees_what_the_codes_stand_for() -> None:
    probe = Probe(momentum=0.5)
    rule = Stored(probe, Storage(min_elements=1, block=16))
    _, state = run(rule, gradients((8, 8), 3))
    expected = dequantize_blockwise(
        tensor_of(state, "momentum.q8"), tensor_of(state, "momentum.scale"), signed=True, block=16
    )
    rule.update(torch.zeros(8, 8), state, torch.zeros(8, 8), Rates(0.1, 0.1))
    assert torch.equal(probe.seen, expected)
    assert probe.seen.any()


FORMATS: list[dict[str, Any]] = [
    {},
    {"first": "q4", "second": "q4", "block_q4": 8},
    {"first": "q4", "second": "q8_linear", "block_q4": 24},
    {"first": "bf16", "second": "q4"},
    {"first": "fp32", "second": "bf16"},
]


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 10), (7, 19), (3,)])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_pieces_make_the_whole(
    rule: Transform,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    formats: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A parameter in pieces of some blocks, the last one cut: the same weights, codes and number of steps."""
    grads, wrapped = gradients(shape, 4), Stored(rule, Storage(min_elements=1, block=16, **formats))
    whole, state = run(wrapped, grads, dtype)
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 48)
    parts, same = run(wrapped, grads, dtype)
    assert torch.equal(whole, parts)
    assert state.keys() == same.keys()
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(same[key])) for key in state)


OFF_BY = {"bf16": 0.02, "q8": 0.03, "q8_linear": 0.08, "q4": 0.25}
"""Of the displacement: about half a gap of the code book, where most numbers of a block are of one magnitude."""


@pytest.mark.parametrize("fmt", OFF_BY)
@pytest.mark.parametrize("rule", [Adafactor(), Adafactor(beta1=0.9), *RULES], ids=repr)
def test_any_rule_stays_near_its_exact_self(rule: Transform, fmt: Any) -> None:
    """After 20 updates the rounding has moved weights by a small share of their displacement."""
    grads = [grad + 0.5 for grad in gradients((40, 20), 20)]
    plain, _ = run(rule, grads)
    coded, state = run(Stored(rule, Storage(fmt, fmt, fmt, min_elements=1)), grads)
    assert any(key.endswith(f".{fmt}") for key in state)
    difference = (coded - plain).norm() / (plain - 1).norm()
    assert 0 < difference < OFF_BY[fmt]


def test_a_tiny_second_moment_is_kept_from_zero() -> None:
    """One entry has a gradient of 1e-4 of its block's: stored as 0 its next step without gradient would be m / eps."""
    grads = [torch.tensor([1.0, 1e-4]), torch.tensor([1.0, 0.0])]
    steps = {}
    for keep in (False, True):
        param, _ = run(Stored(Adam(), Storage(min_elements=1, keep_nonzero=keep)), grads)
        steps[keep] = abs(float(param[1]) - 1)
    assert steps[False] > 10
    assert steps[True] < 0.3


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_a_coded_basis(shape: tuple[int, int], side: Any, storage: Any) -> None:
    subspace = Svd(rank=5, side=side, storage=storage, storage_group=64)
    state = subspace.init(torch.empty(shape, device="meta"), SLOT)
    sides = {"std": [min(shape)], "reverse_std": [max(shape)], "full": list(shape)}[side]
    expected = sum(-(-5 * d // (2 if storage == "int4" else 1)) + 5 * -(-5 * d // 64) for d in sides)
    held = [value for value in state.values() if isinstance(value, Tensor)]
    assert sum(value.numel() * value.element_size() for value in held) == expected
    assert all(key.startswith("basis") for key, value in state.items() if isinstance(value, Tensor))


def projections(subspace: DenseBasis, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What is projected and what comes back."""
    state = subspace.init(grad, Slot("w", 3, 0.0, grad.dtype)) | {"updates_done": 0}
    assert subspace.refresh(grad.clone(), state)
    low = subspace.down(grad, state)
    return low, subspace.up(low, state, grad.shape).tensor()


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("storage", "bound"), [("int8", 0.02), ("int4", 0.4)])
def test_coded_basis_projects_nearly_as_the_basis(
    storage: Any, bound: float, side: Any, shape: tuple[int, int]
) -> None:
    grad = gradients(shape, 1, torch.float64)[0]
    exact = projections(Svd(rank=5, side=side), grad)
    coded = projections(Svd(rank=5, side=side, storage=storage, storage_group=64), grad)
    for ours, theirs in zip(coded, exact, strict=True):
        assert 1e-4 < (ours - theirs).norm() / theirs.norm() < bound


def test_coded_basis_is_used_alike_both_ways() -> None:
    """up is the transpose of down: <down(X), Y> = <X, up(Y)>, as no descent direction would be kept otherwise."""
    subspace = Svd(rank=3, storage="int4", storage_group=16)
    left, right = gradients((9, 14), 2, torch.float64)
    state = subspace.init(left, Slot("w", 3, 0.0, torch.float64)) | {"updates_done": 0}
    subspace.refresh(left.clone(), state)
    low = subspace.down(right, state)
    back = subspace.up(low, state, right.shape).tensor()
    assert torch.allclose((low * low).sum(), (right * back).sum(), rtol=1e-12)
    assert not subspace.orthonormal
    assert Svd.orthonormal


@pytest.mark.parametrize("subspace", [Svd, Randomized])
def test_zero_gradient_leaves_the_codes(subspace: Any) -> None:
    made = subspace(rank=2, storage="int4")
    grad = gradients((6, 8), 1)[0]
    state = made.init(grad, SLOT) | {"updates_done": 0}
    assert not made.refresh(torch.zeros(6, 8), state)
    assert made.down(grad, state).any()  # an arbitrary basis for what comes before the first gradient
    made.schedule_next(state, 0, made.refresh(grad.clone(), state))
    before = tensor_of(state, "basis_left.codes").clone()
    assert not made.refresh(torch.zeros(6, 8), state)
    assert torch.equal(tensor_of(state, "basis_left.codes"), before)


def test_rotation_goes_through_the_codes() -> None:
    """A basis that turns by an exchange of two vectors exchanges the moments, which are in codes."""
    rule = Stored(Adam(), Storage(min_elements=1, block=8))
    state = rule.init(torch.empty(4, 2), SLOT)
    for grad in gradients((4, 2), 3):
        rule.update(grad, state, torch.empty(4, 2), Rates(0.1, 0.1))
    before = [rule.storage.decode(key, state).clone() for key in ("exp_avg", "exp_avg_sq")]

    def exchange(low: Tensor, *, squared: bool = False) -> Tensor:
        return low.flip(1)

    rule.rotate(state, exchange)
    for key, old in zip(("exp_avg", "exp_avg_sq"), before, strict=True):
        torch.testing.assert_close(
            rule.storage.decode(key, state), old.flip(1), rtol=0, atol=float(old.abs().max()) * 0.008
        )


def test_saved_state_loads_safely() -> None:
    rule = InSubspace(Svd(rank=2, storage="int4"), Stored(Adam(), Storage(min_elements=1)), Backproject())
    _, state = run(rule, gradients((8, 6), 2))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(torch.equal(torch.as_tensor(loaded[key]), torch.as_tensor(value)) for key, value in state.items())


def test_what_is_refused_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"strategy\.storage\.block"):
        Storage(block=0)
    with pytest.raises(ValueError, match=r"strategy\.storage\.block_q4 is 15; it must be even"):
        Storage(block_q4=15)
    with pytest.raises(ValueError, match=r"strategy\.storage\.basis=q4: the subspace Dct .*basis=null"):
        Dct(rank=2).store_basis_as("q4")
    with pytest.raises(ValueError, match=r"strategy\.storage\.basis=q4, but strategy\.subspace\.storage=int8"):
        Svd(rank=2, storage="int8").store_basis_as("q4")
    with pytest.raises(ValueError, match=r"strategy\.storage\.min_elements"):
        Storage(min_elements=0)
    with pytest.raises(ValueError, match=r"strategy\.subspace\.storage_group"):
        Svd(rank=2, storage="int4", storage_group=0)
    with pytest.raises(ValueError, match=r"strategy\.subspace\.storage=int4 .* Online"):
        Online(rank=2, storage="int4")
