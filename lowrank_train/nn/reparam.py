"""The protocol of a reparametrised linear layer, and of the choice that makes one out of a plain one."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.nn.events import Event


@dataclass(frozen=True)
class Origin:
    """Where a layer's random numbers come from: the run's seed and the name of the module it takes the place of."""

    name: str = ""
    seed: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """A generator on the CPU that is the same on every rank, device and resumption; one for each purpose."""
        return torch.Generator().manual_seed(self.seed_of(purpose))

    def seed_of(self, purpose: str) -> int:
        """A 63-bit seed; one for each purpose."""
        return seed_from_name(self.seed, f"{self.name}/{purpose}")


@dataclass
class Weights(ABC):
    """How the matrices of the linear layers that `modules` matches are represented; a choice of the axis `weights`.

    A choice is a dataclass derived from this one, and its fields are the options.
    """

    modules: list[str] = field(default_factory=lambda: ["*.self_attn.*", "*.mlp.*"])  # patterns of module names

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape, (out_features, in_features), cannot be represented; None if it can."""
        rank = getattr(self, "rank", None)  # most choices have one
        if rank is not None and rank > min(shape):
            return f"strategy.weights.rank is {rank}, above the short side of {shape[0]} x {shape[1]}"
        return None

    def layer(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        """The layer that takes the place of `linear`. ValueError when the shape does not fit."""
        fault = self.misfit((linear.out_features, linear.in_features))
        if fault is not None:
            raise ValueError(fault)
        return self.build(linear, origin)

    @abstractmethod
    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        """As `layer`, for a shape that fits."""

    def swap_(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        """Put the layers in place of the linear layers of these names."""
        for name in names:  # each goes before the next is made: both forms of all may be too much
            parent, _, leaf = name.rpartition(".")
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(model.get_submodule(parent), leaf, self.layer(linear, Origin(name, seed)))

    def events(self) -> Sequence[Event]:
        """What happens to the layers outside the updates, such as drawing other vectors; most have nothing."""
        return ()

    @property
    def begins_after_steps(self) -> int:
        """Updates before the layers take their form, such as a dense warm start."""
        return 0

    def set_length(self, steps: int) -> None:  # noqa: B027 nothing, for most
        """Take note of the updates of the run before layers and events are made: some things come near its end."""

    def lr_ratios(self) -> Mapping[str, float]:
        """Local parameter name -> what its learning rate is multiplied by, where that is not 1."""
        return {}

    def keep_base_(self, model: nn.Module, names: Sequence[str]) -> None:  # noqa: B027 as it is, for most
        """Bring the plain linear layers of these names into the form in which the layers keep them."""

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        """PEFT's name of this representation and its options there. ValueError where PEFT has none such."""
        raise ValueError(f"PEFT has no {type(self).__name__}")


class ReparamLinear(nn.Module, ABC):
    """y = x W^T + bias, where W = dense_weight(), (out_features, in_features), is stored in another form.

    Parameters that are trained ask for gradients, those that are only kept do not, and everything else that training
    needs is a buffer: state_dict() holds the layer whole, in any phase of its life. A layer that gains or loses
    parameters as it is trained overrides `take_form_`, so that any of its forms can be loaded into a fresh one.
    """

    def __init__(self, linear: nn.Linear, weights: Weights, origin: Origin) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weights = weights
        self.origin = origin
        self.bias = linear.bias

    choice: ClassVar[type[Weights]]

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str = "", seed: int = 0, **options: Any) -> ReparamLinear:
        """The layer in place of `linear`; `options` are the fields of the choice it belongs to. ValueError, TypeError
        for options that do not exist or do not fit."""
        return cls.choice(**options).layer(linear, Origin(name, seed))

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """W, (out_features, in_features), in at least float32: what an export writes. Differentiable."""

    def dense_bias(self) -> Tensor:
        """What an export writes beside it, for a layer with a bias."""
        return self.bias

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        """What PEFT's layer of `Weights.as_peft` over the matrix `base` holds besides it, under PEFT's names."""
        raise ValueError(f"PEFT has no {type(self).__name__}")

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.dense_weight().to(x.dtype), self.bias)

    def fold_(self, number: int = 1) -> None:
        """Begin round `number` (counted from 1) of a method that goes in rounds; dense_weight() stays what it is."""
        raise ValueError(f"{type(self).__name__} has no rounds to fold; it goes without strategy.merge")

    def renewed(self) -> Sequence[nn.Parameter]:
        """The parameters that fold_() gave new values, whose moments belong to the old ones."""
        return ()

    def place_(self, rank: int, ranks: int) -> None:
        """Be the layer of this process among `ranks`, before anything is loaded or trained; nothing, for most."""

    def rank_local(self) -> Sequence[str]:
        """The parameters whose values differ from rank to rank: each learns from its own rank's gradient alone, and a
        checkpoint holds those of all ranks, one after the other along the first dimension."""
        return ()

    def meet_ranks_(self) -> None:
        """Called on all ranks at once before an evaluation: dense_weight() is then the same on each, and needs no other
        rank until the next forward pass in training."""

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        """Have the parameters and buffers of these names and shapes, as a checkpoint has them; their values follow."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        self.take_form_({name: value.shape for name, value in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def layers_of(model: nn.Module) -> dict[str, ReparamLinear]:
    """Module name -> reparametrised layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ReparamLinear)}


def dense_state_dict(model: nn.Module, arithmetic: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state of the plain model that this one stands for: each reparametrised layer as `weight` and `bias`.

    A dense weight is computed in at least float32, or in `arithmetic` where that is wider, a layer at a time, and
    rounded once, to the dtype of the layer's first parameter.
    """
    layers = layers_of(model)
    plain = {}
    for name, tensor in model.state_dict().items():
        owner = next((path for path in _ancestors(name) if path in layers), None)
        if owner is None:
            plain[name] = tensor
        elif name == f"{owner}.bias":
            plain[name] = layers[owner].dense_bias()
        elif f"{owner}.weight" not in plain:
            with torch.no_grad():
                layer = layers[owner]
                wide = layer if arithmetic.itemsize <= 4 else copy.deepcopy(layer).to(arithmetic)
                plain[f"{owner}.weight"] = wide.dense_weight().detach().to(_dtype_of(layer))
    return plain


def _ancestors(name: str) -> list[str]:
    """The names of the modules around a tensor, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _dtype_of(layer: ReparamLinear) -> torch.dtype:
    return next(parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())


def kept(tensor: Tensor) -> nn.Parameter:
    """A tensor that belongs to the weights but is not trained: moved, cast and counted with the parameters."""
    return nn.Parameter(tensor, requires_grad=False)


def sum_over_ranks_(total: Tensor) -> None:
    """Add up in place what every process has of it; one alone has it all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)


def uniform(shape: tuple[int, ...], bound: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers uniform in [-bound, bound] with the device and dtype of `like`; drawn on the CPU in float32, so that
    they are the same on every device. On meta nothing is drawn."""
    if like.is_meta:
        return torch.empty(shape, device="meta", dtype=like.dtype)
    drawn = torch.empty(shape, dtype=torch.promote_types(like.dtype, torch.float32), device="cpu")
    return drawn.uniform_(-bound, bound, generator=generator).to(like.device, like.dtype)


def normal(shape: tuple[int, ...], std: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """As `uniform`, from N(0, std^2)."""
    if like.is_meta:
        return torch.empty(shape, device="meta", dtype=like.dtype)
    drawn = torch.empty(shape, dtype=torch.promote_types(like.dtype, torch.float32), device="cpu")
    return drawn.normal_(0.0, std, generator=generator).to(like.device, like.dtype)
