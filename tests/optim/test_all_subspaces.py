"""The contract of every subspace: down, up, subtract_, change, init and seeds, for all shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.coordinates import Coordinates, SampledLines
from lowrank_train.optim.subspace.cross_head import CrossHead
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.geodesic import Geodesic
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.subspace.power import Power
from lowrank_train.optim.subspace.random import Gaussian, Orthonormal, SvdThenRandom
from lowrank_train.optim.subspace.randomized import Randomized
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, State

SHAPES = [(30, 12), (12, 30), (16, 16), (13, 7)]
HEADS = {"head_dim": 1, "row_heads": ["rows"], "column_heads": ["columns"]}
SUBSPACES: dict[str, tuple[type[Subspace], dict[str, Any]]] = {
    "svd": (Svd, {}),
    "svd-reverse": (Svd, {"side": "reverse_std"}),
    "svd-both-sides": (Svd, {"side": "full"}),
    "randomized": (Randomized, {}),
    "power": (Power, {"rho": 0.0}),
    "online": (Online, {}),
    "geodesic": (Geodesic, {"step_size": 0.1}),
    "cross_head": (CrossHead, HEADS),
    "gaussian": (Gaussian, {}),
    "orthonormal": (Orthonormal, {}),
    "svd_then_random": (SvdThenRandom, {"random_from": 1}),
    "dct": (Dct, {}),
    "dct3": (Dct, {"basis": "dct3", "norm": 1}),
    "columns": (Coordinates, {"density": None}),
    "rows-top": (Coordinates, {"density": None, "of": "rows", "choose": "top"}),
    "entries": (Coordinates, {"density": None, "of": "entries"}),
    "entries-top": (Coordinates, {"density": None, "of": "entries", "choose": "top"}),
    "sampled-rows": (SampledLines, {"density": None, "of": "rows"}),
    "sampled-columns": (SampledLines, {"density": None}),
}
DRAWN = ["randomized", "cross_head", "gaussian", "orthonormal", "columns", "entries", "sampled-rows", "sampled-columns"]
ROTATES = [
    name
    for name, (kind, options) in SUBSPACES.items()
    if kind.snapshot is not Subspace.snapshot and kind is not SampledLines
]
Maker = Callable[..., Subspace]


def make(name: str, rank: int = 3, **changes: Any) -> Subspace:
    kind, options = SUBSPACES[name]
    return kind(rank=rank, **{**options, **changes})


def is_projection(name: str) -> bool:
    return make(name).orthonormal


def gradient(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def begun(subspace: Subspace, grad: Tensor, seed: int = 5, name: str = "rows") -> State:
    state = subspace.init(grad, Slot(name, seed, 0.0, grad.dtype)) | {"updates_done": 0, "step": 1}
    state["exp_avg"] = grad.new_zeros(subspace.low_shape_of(state, grad.shape))
    move(subspace, grad, state)
    return state


def move(subspace: Subspace, grad: Tensor, state: State) -> bool:
    moved = subspace.refresh(grad, state)
    subspace.schedule_next(state, int(state["updates_done"]), moved)
    subspace.settle(state, Rates(1e-2, 1e-2))
    state["updates_done"] = int(state["updates_done"]) + 1
    return moved


def held(state: State) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "exp_avg"}


def matrix_of(subspace: Subspace, state: State, shape: tuple[int, int]) -> Tensor:
    """down() as a matrix (numbers kept, M N), from what it makes of every unit matrix."""
    units = torch.eye(shape[0] * shape[1], dtype=torch.float64).view(-1, *shape)
    return torch.stack([subspace.down(unit, state).flatten() for unit in units], dim=1)


def back_matrix_of(subspace: Subspace, state: State, shape: tuple[int, int]) -> Tensor:
    low_shape = subspace.low_shape_of(state, torch.Size(shape))
    units = torch.eye(torch.Size(low_shape).numel(), dtype=torch.float64).view(-1, *low_shape)
    return torch.stack([subspace.up(unit, state, torch.Size(shape)).tensor().flatten() for unit in units], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SUBSPACES)
def test_down_and_up_are_transposes(name: str, shape: tuple[int, int]) -> None:
    """Both linear, up = down^T, and low gradients have the shape that was promised."""
    subspace, grad = make(name), gradient(shape)
    state = begun(subspace, grad)
    low = subspace.down(grad, state)
    assert low.shape == subspace.low_shape_of(state, grad.shape)
    down, up = matrix_of(subspace, state, shape), back_matrix_of(subspace, state, shape)
    torch.testing.assert_close(down @ grad.flatten(), low.flatten())
    torch.testing.assert_close(up, down.T)
    back = subspace.up(low, state, grad.shape)
    torch.testing.assert_close(back.tensor().flatten(), up @ low.flatten())
    added = back.scaled(3.0)
    target = grad.clone()
    added.add_to_(target, -0.5)
    torch.testing.assert_close(target, grad - 1.5 * back.tensor())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in SUBSPACES if is_projection(name)])
def test_up_of_down_is_a_projection_after_every_move(name: str, shape: tuple[int, int]) -> None:
    subspace = make(name)
    state = begun(subspace, gradient(shape))
    for seed in (1, 2):
        projection = back_matrix_of(subspace, state, shape) @ matrix_of(subspace, state, shape)
        torch.testing.assert_close(projection @ projection, projection, atol=1e-10, rtol=0)
        kept = torch.Size(subspace.low_shape_of(state, torch.Size(shape))).numel()
        assert projection.trace().item() == pytest.approx(kept)
        move(subspace, gradient(shape, seed), state)


@pytest.mark.parametrize("name", ["gaussian", "sampled-rows", "sampled-columns"])
def test_unbiased(name: str) -> None:
    """The mean of up(down(X)) over many draws is X, to four times its own standard error."""
    shape, subspace = (5, 4), make(name, rank=2)
    grad, probe = gradient(shape), gradient(shape, 1)
    state = begun(subspace, grad)
    samples = []
    for _ in range(4000):
        move(subspace, grad, state)
        samples.append(subspace.up(subspace.down(probe, state), state, probe.shape).tensor())
    drawn = torch.stack(samples)
    error = drawn.std(0) / len(samples) ** 0.5
    assert ((drawn.mean(0) - probe).abs() < 4 * error).all()
    assert (error < 0.2).all()  # against entries of about 1, so that a bias would show


@pytest.mark.parametrize("by", [1.0, 0.25])
@pytest.mark.parametrize("name", SUBSPACES)
def test_subtract(name: str, by: float) -> None:
    for shape in SHAPES:
        subspace, grad = make(name), gradient(shape)
        state = begun(subspace, grad)
        low = gradient(tuple(subspace.low_shape_of(state, grad.shape)), 3)  # type: ignore[arg-type]
        expected = grad - by * subspace.up(low, state, grad.shape).tensor()
        given = grad.clone()
        result = subspace.subtract_(given, low, state, by)
        assert result is given
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROTATES)
def test_change_is_down_in_the_new_basis_of_up_in_the_old(name: str, shape: tuple[int, int]) -> None:
    subspace = make(name)
    state = begun(subspace, gradient(shape))
    move(subspace, gradient(shape, 4), state)  # the online basis rests at its second move
    before, up = subspace.snapshot(state), back_matrix_of(subspace, state, shape)
    moved = {key: value.clone() for key, value in held(state).items()}
    move(subspace, gradient(shape, 1), state)
    assert any(not torch.equal(value, moved[key]) for key, value in held(state).items())
    change = subspace.change(before, state)
    low = gradient(tuple(subspace.low_shape_of(state, torch.Size(shape))), 2)  # type: ignore[arg-type]
    coefficients = matrix_of(subspace, state, shape) @ up
    torch.testing.assert_close(change(low).flatten(), coefficients @ low.flatten(), atol=1e-10, rtol=1e-7)
    squared = change(low, squared=True).flatten()
    torch.testing.assert_close(squared, coefficients.square() @ low.flatten(), atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SUBSPACES)
def test_difficult_gradients(name: str, dtype: torch.dtype) -> None:
    """Zero, rank 1, tiny and huge gradients, in either order, leave everything finite and projections what they are."""
    one = torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 9))
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    for first, second in [(torch.zeros(12, 8), one), (one, torch.zeros(12, 8)), (one * 1e-30, one), (one, one * 1e15)]:
        subspace = make(name)
        state = begun(subspace, first.to(dtype))
        move(subspace, second.to(dtype), state)
        assert all(
            value.isfinite().all() and value.dtype in (dtype, torch.int64, torch.float32)
            for value in held(state).values()
        )
        probe = gradient((12, 8), 1, dtype)
        back = subspace.up(subspace.down(probe, state), state, probe.shape).tensor()
        assert back.dtype == dtype
        if subspace.orthonormal:
            again = subspace.up(subspace.down(back, state), state, probe.shape).tensor()
            torch.testing.assert_close(again, back, atol=tolerance * 4, rtol=0)


@pytest.mark.parametrize(
    "name", ["svd", "randomized", "power", "cross_head", "geodesic", "rows-top", "dct", "entries-top"]
)
def test_what_the_gradient_is_made_of_is_kept(name: str) -> None:
    """A gradient that lies in the space of one move is captured whole; rows and entries where it has few of them."""
    grad = gradient((16, 3)) @ gradient((3, 16), 1)
    if name == "dct":
        whole = make(name, rank=16)
        state = begun(whole, grad)
        grad = whole.up(torch.cat([gradient((16, 3)), torch.zeros(16, 13).double()], 1), state, grad.shape).tensor()
    elif name == "rows-top":
        grad[3:] = 0
    elif name == "entries-top":
        grad = torch.zeros(16, 16, dtype=torch.float64).put_(torch.tensor([7, 99, 255]), gradient((3, 1)).flatten())
    subspace = make(name) if name != "cross_head" else make(name, head_dim=4)
    state = begun(subspace, grad)
    back = subspace.up(subspace.down(grad, state), state, grad.shape).tensor()
    torch.testing.assert_close(back, grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", SUBSPACES)
def test_meta_init_is_what_a_run_holds(name: str) -> None:
    for shape in SHAPES:
        planned = make(name).init(torch.empty(shape, device="meta"), Slot("rows", 5, 0.0, torch.bfloat16))
        real = begun(make(name), gradient(shape, dtype=torch.bfloat16))
        sizes = [{key: (value.shape, value.dtype) for key, value in held(state).items()} for state in (planned, real)]
        assert sizes[0] == sizes[1]
        assert {value.device.type for value in held(planned).values()} <= {"meta"}


@pytest.mark.parametrize("name", SUBSPACES)
def test_deterministic_by_seed(name: str) -> None:
    """The same parameter moves the same way twice; another parameter draws other numbers, where any are drawn."""
    shape = (30, 12)

    def after(seed: int, moves: int = 3) -> dict[str, Tensor]:
        subspace = make(name, **({"cold_iterations": 1} if name == "randomized" else {}))
        state = begun(subspace, gradient(shape), seed)
        for number in range(1, moves):
            move(subspace, gradient(shape, number), state)
        return held(state)

    first, same, other = after(5), after(5), after(6)
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    differs = any(not torch.allclose(value.double(), other[key].double(), atol=1e-6) for key, value in first.items())
    assert differs == (name in [*DRAWN, "svd_then_random"])
