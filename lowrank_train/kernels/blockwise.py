"""Blockwise 8-bit storage with a dynamic code book: the reference in plain torch, and where a kernel runs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowrank_train.kernels.dispatch import is_tile, runs_kernel

DECADES = 7  # the code book reaches down to 1e-7 of a block's largest magnitude
TABLE = 65535  # bitsandbytes' CPU kernel looks codes up in a table of 65,536 values evenly spread from -1 to 1


@functools.cache
def code_book(signed: bool, device: torch.device) -> Tensor:
    """The 256 values in [-1, 1], ascending, float32, that a code stands for: dynamic tree quantisation.

    A decade 10^(i-7) .. 10^(i-6), i = 0..6, is cut into 2^i equal pieces (2^(i+1) unsigned), and the middle of each is
    a value; signed books mirror them; 0 and 1 are added. Small magnitudes keep a small relative error, large ones get
    many values. Dettmers, arXiv 1511.04561, section 2; in this form arXiv 2110.02861, section 2.2. The same numbers bit
    for bit as bitsandbytes' `create_dynamic_map`, whose order of float32 operations is kept for that.
    """
    values = [torch.tensor([0.0, 1.0], device="cpu")]  # whatever device is the default when it is first needed
    for decade in range(DECADES):
        pieces = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, pieces + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    book = torch.cat(values).sort().values
    assert len(book) == 256
    return book.to(device)


@functools.cache
def nearest_codes(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the upper half of every float32: the lowest code nearest to a number that begins so, uint8 (65536,); and the
    numbers between two codes, above which the next code is nearer, (256,).

    Numbers that share the sign, the exponent and 7 bits of the mantissa lie closer together than codes do, so that one
    comparison is left to make: 20 times faster on the CPU than a binary search among the 255 middles.
    """
    book = code_book(signed, torch.device("cpu"))
    middles = (book[:-1] + book[1:]) / 2
    lower = torch.arange(2**16, dtype=torch.int64, device="cpu") << 16
    ends = torch.stack((lower, lower + 0xFFFF)).to(torch.uint32).view(torch.float32)
    ends = torch.where(ends.isfinite().all(0), ends, 0.0)  # no number from [-1, 1] begins like an infinity
    first, last = (torch.bucketize(end, middles) for end in (ends.amin(0), ends.amax(0)))
    assert int((last - first).max()) <= 1
    upper = torch.cat((middles, torch.tensor([torch.inf], device="cpu")))
    return first.to(torch.uint8).to(device), upper.to(device)


def quantize_blockwise(
    values: Tensor, *, signed: bool, block: int = 256, keep_nonzero: bool = False, table: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of the shape of `values`, and the largest magnitude of every block, (blocks,) float32.

    Blocks run over the flattened tensor; the last one may be shorter. code = nearest value of the book to x / largest
    (the lower of two that are equally near). A block of zeros, or of numbers below 1.2e-38, whose reciprocal float32
    cannot hold, gets the largest magnitude 0.
    keep_nonzero: what is not zero does not become zero. Unsigned books only.
    table: round x / largest to a multiple of 2/65535 first, as bitsandbytes 0.50 does on the CPU, where 0 becomes
        1.6e-5 (unsigned) or 2.1e-5 of the block's largest. Has no kernel.
    """
    if not table and is_tile(block) and runs_kernel(values):
        from lowrank_train.kernels.triton import blockwise

        return blockwise.quantize_blockwise(values, signed=signed, block=block, keep_nonzero=keep_nonzero)
    return quantize_blockwise_reference(values, signed=signed, block=block, keep_nonzero=keep_nonzero, table=table)


def quantize_blockwise_reference(
    values: Tensor, *, signed: bool, block: int = 256, keep_nonzero: bool = False, table: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_blockwise` in plain torch."""
    flat = values.detach().flatten().float()
    blocks = -(-flat.numel() // block)
    padded = torch.nn.functional.pad(flat, (0, blocks * block - flat.numel())).view(blocks, block)
    largest = torch.maximum(padded.amax(1), padded.amin(1).neg_())
    largest = torch.where(largest < torch.finfo(torch.float32).tiny, 0.0, largest)
    scaled = padded * torch.where(largest > 0, 1 / largest, 0.0)[:, None]
    if table:
        scaled = (scaled + 1).mul_(0.5).mul_(TABLE).add_(0.5).floor_().div_(TABLE).mul_(2).sub_(1)
    scaled = scaled.flatten()
    nearest, upper = nearest_codes(signed, values.device)
    codes = nearest.index_select(0, (scaled.view(torch.int32) >> 16) & 0xFFFF)
    codes += scaled > upper.index_select(0, codes.int())
    if keep_nonzero:
        codes += (codes == 0) & (scaled > 0)
    return codes[: flat.numel()].view(values.shape), largest


def dequantize_blockwise(codes: Tensor, largest: Tensor, *, signed: bool, block: int = 256) -> Tensor:
    """The float32 values that codes stand for, in the shape of `codes`."""
    if is_tile(block) and runs_kernel(codes, largest):
        from lowrank_train.kernels.triton import blockwise

        return blockwise.dequantize_blockwise(codes, largest, signed=signed, block=block)
    return dequantize_blockwise_reference(codes, largest, signed=signed, block=block)


def dequantize_blockwise_reference(codes: Tensor, largest: Tensor, *, signed: bool, block: int = 256) -> Tensor:
    """`dequantize_blockwise` in plain torch."""
    flat = code_book(signed, codes.device).index_select(0, codes.flatten().int())
    whole = flat.numel() // block * block
    flat[:whole].view(-1, block).mul_(largest[: whole // block, None])
    if whole < flat.numel():
        flat[whole:].mul_(largest[-1])
    return flat.view(codes.shape)
