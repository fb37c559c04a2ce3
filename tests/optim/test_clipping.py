"""Clipping scales the gradient of this update and nothing that a rule carries over from earlier ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_train


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_fed_back_error_is_not_clipped(clip: float) -> None:
    """The optimizer's own clipping equals clipping the gradients before they are handed over."""
    weights = []
    for inside in (True, False):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.randn(12, 8, generator=generator, dtype=torch.float64))
        optimizer = lowrank_train.optimizer(
            "ldadam", [("w", param)], lr=0.1, project=["w"], rank=3, grad_clip=clip if inside else None
        )
        for update in range(6):
            param.grad = torch.randn(12, 8, generator=generator, dtype=torch.float64) * 10 ** (update % 3 - 1)
            if not inside:
                nn.utils.clip_grad_norm_([param], clip)
            optimizer.step()
        weights.append(param.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)
