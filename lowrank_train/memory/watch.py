"""Real code on fake tensors: every storage that comes alive is counted, and nothing is allocated or computed."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from lowrank_train.kernels.blockwise import code_book, nearest_codes
from lowrank_train.kernels.pieces import PIECE_ELEMENTS
from lowrank_train.memory.counting import parts_of
from lowrank_train.memory.remembered import Remembered
from lowrank_train.optim.subspace.dct import cosine_basis

aten = torch.ops.aten
PROCESS_TABLES = (code_book, nearest_codes, cosine_basis)


def _as_its_input(tensor: Tensor, *_: Any) -> int:
    return tensor.numel() * tensor.element_size()


WORKSPACE_BYTES: dict[Any, Callable[..., int]] = {
    aten.logsumexp.default: _as_its_input,  # exp(x - max x) is written out: aten/src/ATen/native/ReduceOps.cpp
    aten._linalg_svd.default: _as_its_input,  # the decomposition works in a copy: BatchLinearAlgebra.cpp beside it
}
"""What operations that matter here allocate for themselves alone, by their arguments."""


def _flash_backward(_: Tensor, query: Tensor, *rest: Any) -> int:
    rows, heads, positions, width = query.shape
    return 4 * rows * heads * (-(-positions // 128) * 128) * (-(-width // 32) * 32 + 1)


WORKSPACE_BYTES_ON_A_CARD: dict[Any, Callable[..., int]] = WORKSPACE_BYTES | {
    # float32 sums of the query's gradient, and one number a position; flash-attention's mha_bwd (arXiv 2307.08691)
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
}
"""The same, where the operation stands for its kin on a card."""


REAL = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.randperm.generator)
"""What has numbers all the same where they are integers, with all that follows from it alone, for they decide what the
code does next: a row with positions that it cannot read transformers takes for several documents, with a mask."""


MOST_POSITIONS = 1 << 17


class Segment(NamedTuple):
    """The time from one touch of a parameter to the touch of another."""

    phase: str
    tensor: str  # the parameter's name; "" before the first
    visit: int  # how often this phase has come back to it


@dataclass
class Extent:
    """Bytes alive at the beginning of a segment, and at its highest."""

    start: int
    peak: int


@dataclass
class Watched:
    """What a run on fake tensors has shown."""

    segments: dict[Segment, Extent] = field(default_factory=dict)
    moments: dict[str, int] = field(default_factory=dict)  # bytes alive at moments that were given a name


class StorageWatch(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, from their birth to their end, cut into segments.

    Operations run on fake tensors, which have shapes and no numbers. Where code asks for a number, every number is 1
    (so gradients are finite and not zero, and clipping clips), a truth value is what the last comparison makes of 1,
    and every place of a mask is chosen: all tokens of a row are targets, the most there can be. What an operation
    allocates for itself alone is seen only where WORKSPACE_BYTES names it.
    """

    def __init__(self, *, on_a_card: bool) -> None:
        super().__init__()
        self._workspaces = WORKSPACE_BYTES_ON_A_CARD if on_a_card else WORKSPACE_BYTES
        self._remembered = Remembered()
        self.seen = Watched()
        self.bytes_now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}  # of those alive, in bytes
        self._truths: dict[int, bool] = {}  # of truth values alive, by storage
        self._names: dict[int, str] = {}  # of parameters, by storage
        self.begin("")

    def name_parameters(self, model: nn.Module) -> None:
        """Segments go by these parameters from now on."""
        self._names = {_key(part): name for name, param in model.named_parameters() for part in parts_of(param)}

    def begin(self, phase: str) -> None:
        """What follows belongs to this phase."""
        self._visits: dict[str, int] = {}
        self._begin(Segment(phase, "", 0))

    def cut(self, tensor: Tensor, size_bytes: int) -> None:
        """From now on a tensor counts as so many bytes: the part that one of several devices keeps of it."""
        self._count(tensor)
        self.bytes_now += size_bytes - self._sizes[_key(tensor)]
        self._sizes[_key(tensor)] = size_bytes

    def mark(self, moment: str) -> None:
        """Note the bytes that are alive now."""
        self.seen.moments[moment] = self.bytes_now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked at every turn
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        inputs = [*_tensors_in(args), *_tensors_in(kwargs.values())]
        if any(type(leaf) is not FakeTensor and is_traceable_wrapper_subclass(leaf) for leaf in inputs):
            return NotImplemented  # it says itself what it does with its parts, and those come by here
        if func is aten._local_scalar_dense.default and isinstance(inputs[0], FakeTensor):
            return self._number(inputs[0])
        self._follow(inputs)
        generator = kwargs.get("generator")
        is_real = inputs or (func in REAL and _decides(args, kwargs))
        if is_real and not any(isinstance(leaf, FakeTensor) for leaf in inputs):
            with _disable_current_modes():
                return self._take_in(func(*args, **kwargs))
        if generator is not None:
            kwargs["generator"] = None
        out = self._remembered(func, self._chosen(args) if func is aten.index.Tensor else args, kwargs)
        self._take_in(out, func, args)
        workspace = self._workspaces.get(func, lambda *_: 0)(*args)
        self._extent.peak = max(self._extent.peak, self.bytes_now + workspace)
        return out

    def _take_in(self, out: Any, func: Any = None, args: Any = ()) -> Any:
        for tensor in _tensors_in((out,)):
            self._count(tensor)
            if func is not None and tensor.dtype is torch.bool and tensor.numel() <= 1 << 12:
                self._truths[_key(tensor)] = self._truth(func, args)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive:
            return
        self._sizes[key] = storage.nbytes()

        def gone(_: object) -> None:
            del self._alive[key]
            self._truths.pop(key, None)
            self.bytes_now -= self._sizes.pop(key)

        self._alive[key] = weakref.ref(storage, gone)
        self.bytes_now += self._sizes[key]
        self._extent.peak = max(self._extent.peak, self.bytes_now)

    def _follow(self, inputs: Iterable[Tensor]) -> None:
        """Begin a new segment where a parameter is used that is not the last one."""
        for tensor in inputs:
            name = self._names.get(_key(tensor))
            if name is not None and name != self._segment.tensor:
                self._visits[name] = self._visits.get(name, 0) + 1
                self._begin(Segment(self._segment.phase, name, self._visits[name]))

    def _begin(self, segment: Segment) -> None:
        self._segment = segment
        self._extent = self.seen.segments.setdefault(segment, Extent(self.bytes_now, self.bytes_now))

    def _number(self, tensor: Tensor) -> float | int | bool:
        if tensor.dtype is torch.bool:
            return self._truths.get(_key(tensor), True)
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _truth(self, func: Any, args: Any) -> bool:
        """What the operation makes of ones, and of the truth values it is given."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return torch.full((), self._truths.get(_key(leaf), True), dtype=leaf.dtype)

        with _disable_current_modes():
            try:
                return bool(func(*tree_map(one, args)))
            except (RuntimeError, IndexError, TypeError, ValueError):  # it wants more dimensions than a number has
                return True

    def _chosen(self, args: Any) -> Any:
        """The arguments of an index with each mask written out as the places of all its entries."""
        tensor, indices = args
        places: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype is torch.bool:
                places += [torch.empty(index.numel(), dtype=torch.int64, device=index.device) for _ in index.shape]
            else:
                places.append(index)
        return tensor, places


@contextmanager
def fake_world(*, on_a_card: bool) -> Iterator[StorageWatch]:
    """Everything that is made inside is fake, and counted; tables that are kept for the process are made anew.

    Fake tensors are the CPU's, for a build of torch without CUDA refuses those of a card. `on_a_card` walks large
    tensors in pieces of the size that is taken there.
    """
    piece_elements = PIECE_ELEMENTS["cpu"]
    if on_a_card:
        PIECE_ELEMENTS["cpu"] = PIECE_ELEMENTS["cuda"]
    for cached in PROCESS_TABLES:
        cached.cache_clear()
    try:
        with (
            warnings.catch_warnings(),
            FakeTensorMode(allow_non_fake_inputs=True),
            StorageWatch(on_a_card=on_a_card) as watch,
        ):
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # to compare two
            yield watch
    finally:
        PIECE_ELEMENTS["cpu"] = piece_elements
        for cached in PROCESS_TABLES:
            cached.cache_clear()  # no fake one may be left for those who compute


def make_fake(model: nn.Module, device: torch.device) -> None:
    """Replace the meta tensors of a model by fake ones of `device`, tied ones by one and the same; in `fake_world`."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    fake = _fake(tensor, device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[tensor]  # type: ignore[assignment]


def _decides(args: Any, kwargs: Any) -> bool:
    """Whether a range is one of positions, and not of every number of a matrix, from which random bits are made."""
    whole = not getattr(kwargs.get("dtype"), "is_floating_point", False)
    return whole and all(abs(value) <= MOST_POSITIONS for value in args if isinstance(value, int | float))


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: _fake(getattr(tensor, name), device) for name in names}
        made: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
        return made
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _key(tensor: Tensor) -> int:
    """The storage of a tensor, as long as it lives."""
    return tensor.untyped_storage()._cdata
