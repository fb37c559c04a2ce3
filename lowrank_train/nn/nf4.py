"""A kept matrix in the 4-bit NormalFloat codes of QLoRA, decoded for each product and never held decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Numbers that share a scale, as in the paper (section 3)."""

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The NormalFloat data type (arXiv 2305.14314, appendix E): quantiles of N(0, 1) over the largest, zero among them."""


class NF4Linear(nn.Linear):
    """y = x W^T + bias with W kept as 4-bit codes, 4.5 bits a number: `codes` two to a byte, `scale` one to 64 numbers.

    Whoever asks for `weight` gets it decoded, in the dtype it had; assigning to it changes nothing that is kept.
    Products decode W for their own length, forward and backward.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = encoded(linear.weight.detach())
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.scale: Tensor
        self.register_buffer("scale", scale)
        self.like: Tensor
        self.register_buffer("like", linear.weight.detach().new_empty(0), persistent=False)  # its dtype goes with casts
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W decoded, (out_features, in_features)."""
        return decoded(self.codes, self.scale, self.out_features, self.in_features).to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = NF4Product.apply(x, self.codes, self.scale, self.out_features, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Moves and casts the layer; scales move, but stay float32, as the codes were made with them."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary layer of the same numbers."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear


class NF4Product(torch.autograd.Function):
    """x (..., in) -> x W^T (..., out); backward decodes W once more: the gradient g of the output gives g W to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.shape = rows, columns
        return F.linear(x, decoded(codes, scale, rows, columns).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        return grad @ decoded(codes, scale, *ctx.shape).to(grad.dtype), None, None, None, None


def encoded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (m, n) -> codes (ceil(m n / 128) * 64) uint8 and scales float32, one for each 64 numbers in the order of rows.

    Each number becomes the nearest level times its block's largest magnitude; the first of a pair has the high bits.
    """
    count = weight.numel()
    blocks = -(-count // (2 * BLOCK)) * 2
    if weight.is_meta:
        codes = weight.new_empty(blocks * BLOCK // 2, dtype=torch.uint8)
        return codes, weight.new_empty(blocks, dtype=torch.float32)
    flat = F.pad(weight.detach().reshape(-1).float(), (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    scale = flat.abs().amax(1)
    levels = torch.tensor(LEVELS, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    found = torch.bucketize(flat / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None], middles)
    pairs = found.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], scale


def decoded(codes: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `encoded`, up to its rounding: (rows, columns) in float32."""
    levels = torch.tensor(LEVELS, device=codes.device)
    pairs = torch.stack((codes >> 4, codes & 15), 1)
    numbers = levels[pairs.view(len(scale), BLOCK).int()] * scale.float()[:, None]
    return numbers.view(-1)[: rows * columns].view(rows, columns)
