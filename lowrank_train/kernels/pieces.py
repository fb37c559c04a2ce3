"""Large tensors walked in pieces, so that what is made on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PIECE_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Small enough to save memory, and large enough that waking the threads or launching the kernels costs little."""


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors piece by piece, as flat views of the same elements, all of them once; whole where not contiguous."""
    size = PIECE_ELEMENTS["cuda" if tensors[0].is_cuda else "cpu"]
    if tensors[0].numel() <= size or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


def row_runs(tensor: Tensor) -> Iterator[slice]:
    """Runs of an even number of rows, of the size of a piece where rows are small; together the whole tensor."""
    rows = PIECE_ELEMENTS["cuda" if tensor.is_cuda else "cpu"] * len(tensor) // max(1, tensor.numel())
    rows = max(2, rows // 2 * 2)  # even: codes of 4 bits, two to a byte, are not torn apart
    for start in range(0, len(tensor), rows):
        yield slice(start, min(start + rows, len(tensor)))


def part(tensor: Tensor, rows: slice, whole: Tensor) -> Tensor:
    """These rows of a tensor that is multiplied by `whole`: all of it, where it is the same for every row."""
    return tensor[rows] if tensor.ndim == whole.ndim and len(tensor) == len(whole) else tensor
