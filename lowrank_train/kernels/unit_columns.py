"""Columns brought back to unit length in place, as SST does with its singular vectors after every update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_train.kernels.dispatch import runs_kernel


def unit_columns_(matrix: Tensor) -> None:
    """u_i <- u_i / max(||u_i||, 1e-12) for each column of a matrix (dimension, R), rounded once.

    The step after that of sampled singular vectors (SST, arXiv 2405.15481, section 3.3), in one launch in place of a
    handful for each matrix, of which a model has two a layer.
    """
    if matrix.is_contiguous() and runs_kernel(matrix):
        from lowrank_train.kernels.triton import unit_columns

        unit_columns.unit_columns_(matrix)
    else:
        unit_columns_reference_(matrix)


def unit_columns_reference_(matrix: Tensor) -> None:
    """`unit_columns_` in plain torch."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    matrix.copy_(F.normalize(wide, dim=0))
