"""Every adapter of the package PEFT that stands for a matrix, as one choice of representation."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lowrank_train.config.errors import UserError
from lowrank_train.config.peft_names import INSTALL, method_fault, option_fault
from lowrank_train.config.seeding import seed_from_name
from lowrank_train.nn.events import Event
from lowrank_train.nn.nf4 import NF4Linear
from lowrank_train.nn.peft_adalora import AdaLoRAPart, adalora_events
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights

ADAPTER = "default"  # PEFT's name for the only adapter
SEEDS = (
    "projection_prng_key", "random_loc_seed", "random_seed", "projection_seed", "proj_seed", "rng_seed",
)  # fmt: skip
"""Options of PEFT's methods that seed what they draw once and do not train; from the run's seed unless given."""


@dataclass
class Peft(Weights):
    """W = f(W0, theta): PEFT's method `type` with its own options; theta is trained, all else of the model is kept.

    PEFT makes its layers and computes with them; here they are seeded, counted, saved, folded and given their events.
    """

    type: str = "LORA"  # of PEFT, without regard to case: VERA, HRA, ...
    base: Literal["plain", "nf4"] = "plain"  # how W0 is kept: as it is, or in 4-bit codes (QLoRA, arXiv 2305.14314)
    # patterns of parameters that are trained beside the adapters: the fresh heads of classifiers
    also_train: list[str] = field(default_factory=lambda: ["score.*", "classifier.*"])
    options: dict[str, Any] = field(default_factory=dict)  # the method's own, in PEFT's words

    free_keys: ClassVar[str] = "options"  # a configuration writes them beside `type`

    def __post_init__(self) -> None:
        self.type = self.type.upper()
        self._steps: int | None = None
        maker = self._maker()
        taken = tuple(item.name for item in dataclasses.fields(maker))
        for name, value in self.options.items():
            fault = option_fault(self.type, name, value, taken)
            if fault is not None:
                raise ValueError(f"strategy.weights.{name}={value}: {fault}")
        self.peft_config(["any"], 0)  # refused here rather than when the model is built

    def _maker(self) -> Any:
        """PEFT's dataclass of this method's options."""
        known = {str(kind.name): maker for kind, maker in mapping().PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        fault = method_fault(self.type, known)
        if fault is not None:
            raise ValueError(f"strategy.weights.type={self.type}: {fault}")
        return known[self.type]

    def set_length(self, steps: int) -> None:
        self._steps = steps
        self.peft_config(["any"], 0)

    def peft_config(self, names: Sequence[str], seed: int) -> Any:
        """PEFT's own configuration of this method on the modules of these names."""
        maker = self._maker()
        taken = {item.name for item in dataclasses.fields(maker)}
        given: dict[str, Any] = {name: seed_from_name(seed, name) % 2**31 for name in SEEDS if name in taken}
        if self.type == "IA3":
            given["feedforward_modules"] = []
        if "total_step" in taken:  # where the length is not known nothing is trained
            least = self.options.get("tinit", 0) + self.options.get("tfinal", 0) + 1
            given["total_step"] = least if self._steps is None else self._steps
        given |= {name: value for name, value in self.options.items() if value is not None or name not in given}
        with _in_words(self.type):
            return maker(**given, target_modules=list(names))

    def swap_(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        trained = {name for name, param in model.named_parameters() if param.requires_grad}
        config = self.peft_config(names, seed)
        self.keep_base_(model, names)
        kinds = {str(kind.name): tuner for kind, tuner in mapping().PEFT_TYPE_TO_TUNER_MAPPING.items()}
        without_numbers = any(model.get_submodule(name).weight.is_meta for name in names)
        with _in_words(self.type, without_numbers), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from_name(seed, f"peft {self.type}"))
            kinds[self.type](model, config, ADAPTER)
        del model.peft_config  # a mark by which transformers would save an adapter in place of the model
        for name in names:
            parent, _, leaf = name.rpartition(".")
            adapted = model.get_submodule(name)
            if not hasattr(adapted, "base_layer"):
                raise UserError(f"strategy.weights.type={self.type}: PEFT left {name} as it was")
            setattr(model.get_submodule(parent), leaf, self._wrapped(adapted, Origin(name, seed), len(names)))
        for name, param in model.named_parameters():
            if name in trained and any(fnmatchcase(name, pattern) for pattern in self.also_train):
                param.requires_grad_(True)
        first = model.get_submodule(names[0])
        assert isinstance(first, PeftLinear)
        if not next(first.parameters()).is_meta:
            with _in_words(self.type):
                first.dense_weight()  # what cannot be folded is refused before it is trained

    def keep_base_(self, model: nn.Module, names: Sequence[str]) -> None:
        for name in names if self.base == "nf4" else ():
            parent, _, leaf = name.rpartition(".")
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(model.get_submodule(parent), leaf, NF4Linear(linear))

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        alone = nn.ModuleDict({"layer": linear})
        self.swap_(alone, ["layer"], origin.seed)
        layer = alone["layer"]
        assert isinstance(layer, PeftLinear)
        return layer

    def _wrapped(self, adapted: nn.Module, origin: Origin, count: int) -> PeftLinear:
        if self.type == "ADALORA":
            return AdaLoRALinear(adapted, self, origin, count)
        return PeftLinear(adapted, self, origin)

    def events(self) -> Sequence[Event]:
        if self.type != "ADALORA":
            return ()
        if self._steps is None and self.options.get("total_step") is None:
            raise ValueError("strategy.weights.total_step: AdaLoRA's budget needs the number of updates of the run")
        return adalora_events(self.peft_config(["any"], 0))

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return self.type, dict(self.options)


class PeftLinear(ReparamLinear):
    """y = PEFT's layer of x; `adapted` is that layer, with the kept linear one inside it.

    What several layers share (VeRA's matrices, VB-LoRA's bank) is one tensor, which every layer's state names.
    """

    choice = Peft
    weights: Peft

    def __init__(self, adapted: nn.Module, weights: Peft, origin: Origin) -> None:
        base = adapted.get_base_layer()  # type: ignore[operator]
        super().__init__(base, weights, origin)
        self.adapted = adapted.to("meta") if base.weight.is_meta else adapted

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapted(x)
        return y

    @torch.no_grad()
    def _merged(self) -> nn.Linear:
        """The plain layer that PEFT merges a copy of this one into, in at least float32; the base stays as it is."""
        copied: Any = copy.deepcopy(self.adapted).eval()
        wide = torch.promote_types(copied.get_base_layer().weight.dtype, torch.float32)
        if isinstance(copied.base_layer, NF4Linear):
            copied.base_layer = copied.base_layer.plain(wide)
        copied.to(wide)
        copied.merge(adapter_names=[ADAPTER])
        merged: nn.Linear = copied.get_base_layer()
        return merged

    def dense_weight(self) -> Tensor:
        """W, (out_features, in_features); not differentiable, for PEFT merges in place."""
        return self._merged().weight.detach()

    def dense_bias(self) -> Tensor:
        return self._merged().bias.detach().to(self.bias.dtype)

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        state: Mapping[str, Tensor] = self.adapted.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith("base_layer.")}


class AdaLoRALinear(AdaLoRAPart, PeftLinear):
    """PEFT's layer P diag(lambda) Q with the importance of each of its triplets, by which ranks are allocated."""

    def __init__(self, adapted: nn.Module, weights: Peft, origin: Origin, count: int) -> None:
        super().__init__(adapted, weights, origin)
        self.part("ranknum").requires_grad_(False)  # a divisor; get_peft_model lets it be trained, and never saves it
        self.begin_(weights.peft_config(["any"], 0).orth_reg_weight / (2 * count))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.watch()
        return super().forward(x)


def mapping() -> Any:
    """PEFT's registry of methods. ValueError that names the extra where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"strategy.weights: {INSTALL}")
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of kernels that nobody has asked for
    try:
        importlib.import_module("peft")
        return importlib.import_module("peft.mapping")
    finally:
        log.setLevel(level)


@contextmanager
def _in_words(method: str, without_numbers: bool = False) -> Iterator[None]:
    """Turn what PEFT raises for options and shapes that do not fit into a UserError, and pass over its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError, ImportError) as error:
        if without_numbers and isinstance(error, NotImplementedError):
            raise UserError(
                f"strategy.weights.type={method}: PEFT reads the matrices themselves to make these layers, so that "
                "they cannot be planned or explained without a model in memory; training is not affected"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"strategy.weights.type={method}: PEFT says: {lines[0]}") from error
