"""Norms along an axis: beside float64 sums, whatever the layout, the dtype and the number of pieces."""

import pytest
import torch

from lowrank_train.kernels import norms, pieces
from lowrank_train.kernels.norms import norms_along


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("shape", [(5, 3), (3, 17), (64, 64), (1, 7)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_norms_along(dim, shape, transposed, dtype, tolerance, monkeypatch):
    monkeypatch.setitem(pieces.PIECE_ELEMENTS, "cpu", 16)  # several pieces
    assert norms.PIECE_ELEMENTS is pieces.PIECE_ELEMENTS
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    matrix = matrix.T if transposed else matrix
    exact = matrix.double().square()
    for keepdim in (False, True):
        expected = (exact.sum() if dim is None else exact.sum(dim, keepdim=keepdim)).sqrt()
        result = norms_along(matrix, dim, keepdim=keepdim)
        assert result.dtype == torch.promote_types(dtype, torch.float32)
        assert result.shape == expected.shape or dim is None
        torch.testing.assert_close(result.double().reshape(expected.shape), expected, rtol=tolerance, atol=0)


def test_an_empty_line_has_norm_zero():
    assert norms_along(torch.zeros(4, 6), 0).tolist() == [0.0] * 6
