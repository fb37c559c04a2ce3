"""What an operation made of fake tensors is made again, without asking torch, wherever the same is asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Make = Callable[[list[Tensor]], Any]
"""From the tensors among the arguments of an operation to what it returns."""
NEVER = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
"""Operations whose outputs do not follow from shapes, or that change the shape of what they are given."""


class Remembered:
    """Outputs of operations by the shapes, strides and types of their inputs and by their other arguments.

    A model has many layers alike, and a run many updates, so that nearly every operation has been before. Torch's own
    cache of fake outputs asks far more than that these are equal, which takes most of the time of a run.
    """

    def __init__(self) -> None:
        self._makes: dict[tuple[Any, ...], Make | None] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation's outputs: as they were, on new memory or that of its inputs."""
        key: list[Any] = [func]
        tensors: list[Tensor] = []
        if not (_described(args, key, tensors) and _described(kwargs.items(), key, tensors)):
            return func(*args, **kwargs)
        made = self._makes.get(known := tuple(key))
        if made is not None:
            return made(tensors)
        out = func(*args, **kwargs)
        if known not in self._makes:
            self._makes[known] = None if {*NEVER} & {*func.tags} else _make_of(out, tensors, is_view=func.is_view)
        return out


def _described(values: Iterable[Any], key: list[Any], tensors: list[Tensor]) -> bool:
    """Extend the key by all that outputs depend on; False where there is more to it than shapes."""
    for value in values:
        if isinstance(value, FakeTensor):
            if value.constant is not None or value.layout is not torch.strided or value.is_complex():
                return False
            key += (value.dtype, value.fake_device, value.shape, value.stride(), value.storage_offset())
            tensors.append(value)
        elif isinstance(value, Tensor):
            return False
        elif isinstance(value, list | tuple):
            key += (type(value), len(value))
            if not _described(value, key, tensors):
                return False
        else:
            key += (type(value), value)  # 1, 1.0 and True are equal, and do not give the same
    return True


def _make_of(out: Any, tensors: list[Tensor], *, is_view: bool) -> Make | None:
    """How to make such an output; None where it is not one of inputs, their views and tensors on new memory."""
    if isinstance(out, list | tuple):
        parts = [_make_of(part, tensors, is_view=is_view) for part in out]
        memory = [part.untyped_storage()._cdata for part in out if isinstance(part, Tensor)]
        if type(out) not in (list, tuple) or None in parts or (not is_view and len({*memory}) < len(memory)):
            return None
        kind = type(out)
        return lambda given: kind(make(given) for make in parts)  # type: ignore[misc]
    if out is None:
        return lambda _: None
    if not isinstance(out, FakeTensor) or out.constant is not None or out.layout is not torch.strided:
        return None
    for place, tensor in enumerate(tensors):
        if out is tensor:
            return lambda given: given[place]
    return _new(out, tensors, is_view=is_view)


def _new(out: FakeTensor, tensors: list[Tensor], *, is_view: bool) -> Make | None:
    mode, device = out.fake_mode, out.fake_device
    shape, strides, offset, dtype = out.shape, out.stride(), out.storage_offset(), out.dtype
    storage = out.untyped_storage()
    if out.requires_grad or dtype.is_complex:
        return None

    def empty(size: Any, steps: Any) -> Tensor:
        return torch.empty_strided(size, steps, dtype=dtype, device="meta")

    if is_view:
        sources = [place for place, one in enumerate(tensors) if one.untyped_storage()._cdata == storage._cdata]
        if len(sources) != 1 or len(tensors) != 1:
            return None

        def viewed(given: list[Tensor]) -> Tensor:
            with torch._C._DisableTorchDispatch():
                plain = empty((0,), (1,)).set_(given[0].untyped_storage(), offset, shape, strides)
            return FakeTensor(mode, plain, device)

        return viewed
    with torch._C._DisableTorchDispatch():
        is_whole = offset == 0 and empty(shape, strides).untyped_storage().nbytes() == storage.nbytes()
    if not is_whole or any(one.untyped_storage()._cdata == storage._cdata for one in tensors):
        return None

    def made(_: list[Tensor]) -> Tensor:
        with torch._C._DisableTorchDispatch():
            plain = empty(shape, strides)
        return FakeTensor(mode, plain, device)

    return made
