"""The kernel that brings columns to unit length, against its reference and through SST's layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_train.kernels.unit_columns import unit_columns_reference_
from lowrank_train.nn.sst import SSTLinear
from tests.kernels.triton_runs import DEVICE, INTERPRETED, assert_near, needs_device, numbers, there

pytest.importorskip("triton")

import lowrank_train.kernels.triton.unit_columns
from lowrank_train.kernels.triton.unit_columns import unit_columns_

pytestmark = needs_device


@pytest.mark.parametrize("shape", [(150, 41), (30, 5), (300, 16), (1, 3), (7, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """With a column of zeros, which stays one, and one whose length is far from 1."""
    matrix = numbers(*shape, dtype=dtype)
    matrix[:, 0] = 0
    matrix[:, -1] *= 100
    got, expected = there(matrix), matrix.clone()
    unit_columns_(got)
    unit_columns_reference_(expected)
    assert_near(got, expected)
    lengths = got.float().norm(dim=0)[1:]
    torch.testing.assert_close(lengths.cpu(), torch.ones(shape[1] - 1), rtol=0, atol=5e-3)  # of rounded numbers


def test_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr("lowrank_train.kernels.dispatch.has_kernels", lambda device: True)
    calls: list[int] = []
    kernels = lowrank_train.kernels.triton.unit_columns
    monkeypatch.setattr(kernels, "unit_columns_", lambda matrix: (calls.append(1), unit_columns_(matrix)))
    layer = SSTLinear.from_linear(nn.Linear(40, 30, bias=False), rank=4).to(DEVICE)
    with torch.no_grad():
        for part in (layer.U_active, layer.V_active):  # type: ignore[union-attr]
            part.mul_(3)  # type: ignore[operator]
        layer.sigma[0] = -1  # type: ignore[index]
    layer.constrain_()  # type: ignore[operator]
    assert len(calls) == 2 and layer.sigma.min() == 0  # type: ignore[operator,union-attr]
    for part in (layer.U_active, layer.V_active):  # type: ignore[union-attr]
        torch.testing.assert_close(part.norm(dim=0).cpu(), torch.ones(4))  # type: ignore[operator,union-attr]
