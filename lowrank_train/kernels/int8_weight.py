"""A matrix that exists as 8-bit codes alone, and stands where a parameter of a wider dtype is expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lowrank_train.kernels.affine import Affine, dequantize_affine, empty_affine, quantize_affine
from lowrank_train.kernels.int8_linear import int8_linear
from lowrank_train.kernels.int8_update import int8_update_
from lowrank_train.kernels.pieces import PIECE_ELEMENTS

aten = torch.ops.aten
PARTS = ("codes", "scale", "zero")
LIKE = (
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
)
"""Operations that want shape, dtype and device of a tensor, and none of its numbers."""


class Int8Weight(Tensor):
    """W as codes, a scale and a zero for each group of the flattened matrix: int8 weights as in Q-GaLore (arXiv
    2407.08296, section 3.4). 1 + 5 / group bytes a number; the last group may be shorter.

    For autograd and optimizers it is a leaf of `dtype`, whose gradient is a plain tensor of that dtype: F.linear works
    on the codes, and any other operation on decoded numbers. Only `store_` and copy_ change it.
    """

    codes: Tensor  # uint8 (numel,)
    scale: Tensor  # float32, one a group
    zero: Tensor  # uint8, one a group
    group: int
    published: bool  # ranges of groups as in the published code, see quantize_affine

    @staticmethod
    def __new__(
        cls, parts: Sequence[Tensor], shape: Size | tuple[int, ...], dtype: torch.dtype, group: int, published: bool
    ) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)
        for name, part in zip(PARTS, parts, strict=True):
            setattr(made, name, part)
        made.group, made.published = group, published
        return made

    @classmethod
    def of(cls, values: Tensor, *, group: int = 256, published: bool = False) -> Self:
        """`values` to the nearest codes."""
        if values.is_meta:  # a plan builds hundreds, of which no number is computed
            made = empty_affine(values.shape, bits=8, group=group, device=values.device)
        else:
            made = quantize_affine(values, bits=8, group=group, published=published)
        return cls((made.codes, made.scale, made.zero), values.shape, values.dtype, group, published)

    @property
    def affine(self) -> Affine:
        """Its codes, which share their memory with it."""
        return Affine(self.codes, self.scale, self.zero)

    def parts(self) -> dict[str, Tensor]:
        """All that is kept of it, by name."""
        return {name: getattr(self, name) for name in PARTS}

    def with_parts(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Another one of the same kind, of changed parts."""
        parts = [change(part) for part in self.parts().values()]
        return type(self)(parts, self.shape, self.dtype, self.group, self.published)

    def decoded(self) -> Tensor:
        """The numbers in float32; differentiable."""
        found: Tensor = _Decoded.apply(self)
        return found

    def steps(self) -> Tensor:
        """How many steps of its group each number is from 0: int16, of the shape of W."""
        padded = F.pad(self.codes, (0, -len(self.codes) % self.group)).view(-1, self.group)
        away = padded.to(torch.int16).sub_(self.zero[:, None])
        return away.flatten()[: len(self.codes)].view(self.shape)

    @torch.no_grad()
    def store_(self, values: Tensor, *, seed: int | None = None) -> None:
        """W <- values, float32 or narrower, with new scales; rounded at random from a seed, else to the nearest.

        Goes piece by piece, of which number i, counted from 0, draws from seed ^ i: each makes temporaries of its size.
        """
        groups = max(1, PIECE_ELEMENTS["cuda" if self.codes.is_cuda else "cpu"] // self.group)
        pieces = zip(
            self.codes.split(groups * self.group),
            self.scale.split(groups),
            self.zero.split(groups),
            values.detach().reshape(-1).split(groups * self.group),
            strict=True,
        )
        for number, (codes, scale, zero, exact) in enumerate(pieces):
            int8_update_(
                Affine(codes, scale, zero),
                exact,
                decay=1.0,
                group=self.group,
                seed=None if seed is None else seed ^ number,
                published=self.published,
            )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, int, bool]]:
        return list(PARTS), (self.dtype, self.group, self.published)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], context: tuple[torch.dtype, int, bool], shape: Size, stride: Any
    ) -> Self:
        return cls([parts[name] for name in PARTS], shape, *context)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, {self.dtype}, group={self.group}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and isinstance(args[1], cls):
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        weight = args[0]
        if isinstance(weight, cls):
            if func in (aten.detach.default, aten.alias.default):
                return weight.with_parts(lambda part: part)
            if func is aten.clone.default:
                return weight.with_parts(torch.clone)
            if func is aten.copy_.default:
                weight._copy_(args[1])
                return weight
            if func is aten._to_copy.default and kwargs.get("dtype") in (None, weight.dtype):
                device = kwargs.get("device") or weight.device
                return weight.with_parts(lambda part: part.to(device, copy=True))
            if func in LIKE:
                kwargs["device"] = kwargs.get("device") or weight.device
                return func(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), *args[1:], **kwargs)
        written = [
            leaf
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))
        ]
        if any(isinstance(leaf, cls) for leaf in written):
            raise NotImplementedError(f"{func} would write into codes of 8 bits; use Int8Weight.store_")
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def _copy_(self, source: Tensor) -> None:
        """Its own numbers change nothing, coded or decoded: DDP sends each process those of the first."""
        same = isinstance(source, Int8Weight) and (source.group, source.published) == (self.group, self.published)
        if same and source.shape == self.shape:
            assert isinstance(source, Int8Weight)
            for name, part in source.parts().items():
                getattr(self, name).copy_(part)
            return
        values = _plain(source).expand(self.shape)
        if values.dtype is not self.dtype or not torch.equal(values, _plain(self)):
            self.store_(values)


class _Decoded(torch.autograd.Function):
    """The numbers of an Int8Weight; what comes back is the gradient of W."""

    @staticmethod
    def forward(ctx: Any, weight: Int8Weight) -> Tensor:
        return _decoded(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _decoded(weight: Int8Weight) -> Tensor:
    return dequantize_affine(weight.affine, weight.shape, bits=8, group=weight.group)


def _plain(leaf: Any) -> Any:
    return _decoded(leaf).to(leaf.dtype) if isinstance(leaf, Int8Weight) else leaf


def _linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    rows, columns = weight.shape
    out = int8_linear(x, weight.affine, (rows, columns), group=weight.group, owner=weight)
    return out if bias is None else out + bias
