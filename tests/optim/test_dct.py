"""The cosine bases that all matrices of a width share: made once, in one dtype, and counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_train
from lowrank_train.optim.subspace.dct import cosine_basis
from lowrank_train.optim.transform import Slot

SHAPES = [(24, 12), (12, 30), (16, 16), (16, 17)]  # the short sides are 12, 12, 16 and 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_kept_is_what_is_counted(dtype: torch.dtype) -> None:
    """Two bases for four matrices, after updates that project, move and lift; none of them state."""
    cosine_basis.cache_clear()
    params = {f"mlp.{index}.weight": nn.Parameter(torch.ones(s, dtype=dtype)) for index, s in enumerate(SHAPES)}
    optimizer = lowrank_train.optimizer("dct_adamw", params.items(), lr=1e-2, rank=4, use_ef=True)
    for update in range(3):
        generator = torch.Generator().manual_seed(update)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    assert cosine_basis.cache_info().currsize == 2
    bytes_each = 8 if dtype == torch.float64 else 4
    counted = optimizer.state_bytes()
    assert counted["shared"] == (12**2 + 16**2) * bytes_each
    assert sum(value for key, value in counted.items() if key not in ("indices", "shared")) == sum(
        (2 * 4 * max(shape) + shape[0] * shape[1]) * dtype.itemsize for shape in SHAPES
    )


def test_what_shares_nothing_counts_nothing() -> None:
    optimizer = lowrank_train.optimizer("galore", [("mlp.weight", nn.Parameter(torch.ones(8, 6)))], lr=1e-2, rank=2)
    optimizer.initialize()
    assert "shared" not in optimizer.state_bytes()
    blocks = lowrank_train.optimizer("frugal_block", [("mlp.weight", nn.Parameter(torch.ones(8, 6)))], lr=1e-2)
    assert blocks.transforms[0].init(torch.ones(8, 6), Slot("mlp.weight", 0, 0.0, torch.float32, ("mlp.weight",)))
    assert "shared" not in blocks.state_bytes()
