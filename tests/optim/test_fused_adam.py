"""Adam's fused step on a whole tensor equals the update that it stands for, in every convention."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowrank_train.kernels import pieces
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.transform import Rates, Slot, Transform, tensor_of

CONVENTIONS = list(itertools.product([True, False], repeat=3))  # eps inside, decay first, bias corrected


@pytest.mark.parametrize("shape", [(7,), (5, 9), (64, 33)])
@pytest.mark.parametrize("inside, first, corrected", CONVENTIONS)
def test_fused_equals_the_update(shape: tuple[int, ...], inside: bool, first: bool, corrected: bool) -> None:
    adam = Adam((0.8, 0.95), 1e-3, eps_inside=inside, weight_decay_first=first, correct_bias=corrected)
    torch.manual_seed(0)
    fused = torch.randn(shape, dtype=torch.float64)
    plain = fused.clone()
    slot = Slot("w", 0, 0.0, torch.float64)
    states = adam.init(fused, slot), adam.init(plain, slot)
    for update in range(6):
        gradient, rates = torch.randn(shape, dtype=torch.float64), Rates(0.1 * update, 0.5)
        adam.apply(gradient, states[0], fused, rates, 0.01)
        Transform.apply(adam, gradient, states[1], plain, rates, 0.01)
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-14)
    assert states[0]["step"] == states[1]["step"] == 6
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(tensor_of(states[0], key), tensor_of(states[1], key), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_pieces_change_nothing(dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and moments of different widths: in pieces as in one."""
    weights = []
    for size in (2**20, 100):
        monkeypatch.setitem(pieces.PIECE_ELEMENTS, "cpu", size)
        generator = torch.Generator().manual_seed(0)
        param = torch.randn(33, 17, generator=generator).to(dtypes[0])
        adam = Adam()
        state = adam.init(param, Slot("w", 0, 0.0, dtypes[1]))
        for _ in range(3):
            adam.apply(torch.randn(33, 17, generator=generator).to(dtypes[0]), state, param, Rates(0.1, 0.1))
        weights.append(param)
    assert torch.equal(*weights)
