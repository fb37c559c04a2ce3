"""Writing numbers into bfloat16: neighbours, what is kept of them, and pieces that draw their own bits."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.kernels import pieces
from lowrank_train.kernels.rounding import write_rounded_


def drawn(rows: int = 31, columns: int = 45) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 3


def test_what_is_left_over_is_kept() -> None:
    """2^-8 is half a unit in the last of bfloat16's 8 digits, so the residue is that of w and its own error 2^-16."""
    values = drawn()
    weight, residue = (torch.zeros(values.shape, dtype=torch.bfloat16) for _ in range(2))
    write_rounded_(weight, values, residue)
    assert torch.equal(weight, values.bfloat16())
    assert ((weight.float() - values).abs() <= 2**-8 * values.abs()).all()
    assert ((weight.float() + residue.float() - values).abs() <= 2**-16 * values.abs()).all()
    assert residue.count_nonzero() > 0.9 * residue.numel()


def test_at_random_goes_to_a_neighbour_and_follows_the_seed() -> None:
    values = drawn()
    first, again, other = (torch.zeros(values.shape, dtype=torch.bfloat16) for _ in range(3))
    for weight, seed in ((first, 3), (again, 3), (other, 4)):
        write_rounded_(weight, values, seed=seed)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert ((first.float() - values).abs() < 2**-7 * values.abs()).all()
    assert not torch.equal(first, values.bfloat16())


def test_pieces_draw_bits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway numbers in four pieces: no two of the pieces go up at the same places."""
    monkeypatch.setitem(pieces.PIECE_ELEMENTS, "cpu", 64)
    weight = torch.zeros(4, 64, dtype=torch.bfloat16)
    write_rounded_(weight, torch.full((4, 64), 1 + 2**-8), seed=11)
    assert len({tuple(row) for row in weight.tolist()}) == 4
    assert set(weight.flatten().tolist()) == {1.0, 1 + 2**-7}
