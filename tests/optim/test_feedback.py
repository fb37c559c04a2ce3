"""The error of compression kept in codes: what they cost, how far they are from the error, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_train
from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.power import Power
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter, tensor_of
from tests.optim.methods import in_subspace, optimizer_of, rule, run_update, toy_model, weights

SHAPES = [(12, 7), (7, 12), (8, 8), (9, 5)]  # tall, wide, square, odd: 4-bit codes of two rows share bytes
LEVELS = {"int8": 255, "int4": 15}


def gradients(shape: tuple[int, int], updates: int = 6, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * size for _ in range(updates)]


def composed(**feedback: Any) -> InSubspace:
    return InSubspace(Dct(rank=3), Adam(), Backproject(1.0), "rotate", ErrorFeedback(**feedback))


def begun(whole: Transform, shape: tuple[int, int]) -> State:
    return whole.init(torch.zeros(shape, dtype=torch.float64), Slot("w", 0, 0.0, torch.float64))


def error_of(whole: InSubspace, state: State, rows: int) -> Tensor:
    assert whole.feedback is not None
    return whole.feedback.add(torch.zeros(rows, counter(state, "error.width"), dtype=torch.float64), state)


@pytest.mark.parametrize("size", [1.0, 1e-9], ids=str)
@pytest.mark.parametrize("pieces", [2**20, 12], ids=["whole", "in runs of rows"])
@pytest.mark.parametrize("storage", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_within_a_step_of_the_error(
    shape: tuple[int, int], storage: Any, pieces: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each row, and for gradients of any size: half a step for the number, half for the place of 0."""
    monkeypatch.setattr("lowrank_train.kernels.pieces.PIECE_ELEMENTS", {"cpu": pieces, "cuda": pieces})
    whole = composed(storage=storage)
    state = begun(whole, shape)
    for grad in gradients(shape, size=size):
        before = error_of(whole, state, shape[0])
        low = whole.compress(grad.clone(), state)
        source = grad + before
        expected = source - whole.subspace.up(low, state, source.shape).tensor()
        spread = expected.amax(1).clamp_min(0) - expected.amin(1).clamp_max(0)
        off = (error_of(whole, state, shape[0]) - expected).abs().amax(1)
        assert (off <= spread / LEVELS[storage] * (1 + 1e-4)).all()  # and float32's rounding
        assert (off > 0).any(), "it is quantised"


def test_bytes_are_counted_without_a_gradient() -> None:
    """A byte or half a number, a float32 and a byte a row."""
    param = torch.zeros(64, 48, device="meta")
    for storage, bytes_a_number in (("int8", 1.0), ("int4", 0.5)):
        state = ErrorFeedback(storage=storage).init(param, Slot("w", 0, 0.0, torch.float32))  # type: ignore[arg-type]
        found = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
        assert found == 64 * 48 * bytes_a_number + 64 * 5


@pytest.mark.parametrize("storage", LEVELS)
def test_a_row_of_zeros_stays_nothing(storage: Any) -> None:
    whole = composed(storage=storage)
    state = begun(whole, (9, 5))
    whole.compress(torch.zeros(9, 5, dtype=torch.float64), state)
    assert not error_of(whole, state, 9).any()


def test_what_rotation_loses_is_fed_back_from_codes_too() -> None:
    """LDAdam with 8-bit errors beside the exact one: apart by roundings of 1/255 of a row's spread, added up."""
    moved = {}
    for storage in ("state", "int8"):
        inner = Adam((0.908, 0.99), rotation="statistical")
        feedback = ErrorFeedback(0.908 / 0.092, storage=storage)
        whole = InSubspace(Power(rank=3, side="std_left"), inner, Backproject(1.0), "rotate", feedback)
        param, state = torch.zeros(12, 7, dtype=torch.float64), begun(whole, (12, 7))
        for grad in gradients((12, 7)):
            whole.apply(whole.compress(grad.clone(), state), state, param, Rates(1e-2, 1e-2))
        moved[storage] = param
    apart = (moved["state"] - moved["int8"]).norm() / moved["state"].norm()
    assert 0 < apart < 0.05


def test_it_resumes_exactly() -> None:
    part = rule("feedback.ErrorFeedback", storage="int4")
    config = in_subspace(subspace=rule("subspace.dct.Dct", rank=3), feedback=part, on_refresh="rotate")
    runs = []
    for stop in (None, 3):
        model = toy_model()
        optimizer = optimizer_of(config(), model)
        for update in range(6):
            if update == stop:
                saved = optimizer.state_dict()
                optimizer = optimizer_of(config(), model)
                optimizer.load_state_dict(saved)
            run_update(model, optimizer, update)
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_the_published_option_and_what_it_needs() -> None:
    pairs = [("mlp.weight", torch.nn.Parameter(torch.ones(12, 8)))]
    optimizer = lowrank_train.optimizer("dct_adamw", pairs, lr=1e-2, rank=3, use_ef=True, q_ef=True)
    optimizer.initialize()
    [state] = optimizer.state.values()
    assert tensor_of(state, "error.codes").dtype == torch.uint8
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"use_ef": False}, "use_ef is False"),
        ({"use_ef": True, "published": True}, "16 of 256 levels"),
    )
    for options, reason in refused:
        with pytest.raises(ValueError, match=reason):
            lowrank_train.optimizer("dct_adamw", pairs, lr=1e-2, rank=3, q_ef=True, **options)
