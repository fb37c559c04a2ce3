"""The methods that keep state in few bits, from their published options: GaLore with 8-bit Adam, Q-GaLore, Q-APOLLO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_train.kernels.affine import dequantize_affine, quantize_affine
from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.direction import Dense, Direction
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject, Lift, ScaledGradient
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.optim.subspace.lazy import Lazy
from lowrank_train.optim.subspace.random import Gaussian
from lowrank_train.optim.transform import Rates, State, Transform, counter
from lowrank_train.published.options import Options, Recipe, galore_arguments, leading


@dataclass
class SimulatedInt8(InSubspace):
    """Q-GaLore's simulation of int8 weights: after each update a float matrix is rounded to what int8 would hold.

    Saves no memory; the numbers are those of a run with codes (arXiv 2407.08296, section 3.4). The first weights are
    left as they are given.
    """

    group: int = 256  # numbers that share a scale
    stochastic: bool = True
    published: bool = False  # ranges of groups as in the published code, see quantize_affine

    def apply(
        self,
        compressed: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float = 0.0,
        grad: Tensor | None = None,
    ) -> None:
        super().apply(compressed, state, param, rates, decay, grad)
        uniform = None
        if self.stochastic:
            generator = torch.Generator().manual_seed(counter(state, "seed") + counter(state, "updates_done"))
            uniform = torch.rand(param.shape, generator=generator).to(param.device)
        codes = quantize_affine(param, bits=8, group=self.group, uniform=uniform, published=self.published)
        param.copy_(dequantize_affine(codes, param.shape, bits=8, group=self.group))


def bitsandbytes_adam(options: Options) -> tuple[Transform, Transform]:
    """For projected matrices and for the rest: they differ in when weights decay.

    The published code decays projected matrices itself, after the update, and leaves the rest to bitsandbytes, which
    decays before it on the CPU, where the recorded runs were made.
    """
    betas, eps = tuple(options.take("betas", (0.9, 0.999))), options.take("eps", 1e-8)
    storage = Storage(
        min_elements=options.take("min_8bit_size", 4096),
        block=options.take("block", 256),
        keep_nonzero=not options.published,
        table=options.published,
    )
    return (
        Stored(Adam(betas, eps, weight_decay_first=False), storage),
        Stored(Adam(betas, eps), storage),
    )


def galore_8bit(options: Options) -> Recipe:
    qmap = options.take("qmap", "bitsandbytes dynamic / udynamic")
    if qmap != "bitsandbytes dynamic / udynamic":
        raise ValueError(f"galore_8bit's qmap is {qmap!r}; only bitsandbytes' dynamic maps are supported")
    projected, rest = bitsandbytes_adam(options)
    subspace = leading(options, **galore_arguments(options))
    rule = InSubspace(subspace, projected, Backproject(options.take("scale", 0.25)))
    return Recipe(rule, rest, options.take("weight_decay", 0.01))


def composed(options: Options, subspace: Subspace, inner: Transform, lift: Lift) -> InSubspace:
    """With float weights that are rounded to int8 where the option says so."""
    group, stochastic = options.take("weight_group_size", None), options.take("stochastic_round", False)
    if group is None:
        return InSubspace(subspace, inner, lift)
    return SimulatedInt8(subspace, inner, lift, group=group, stochastic=stochastic, published=options.published)


def on_codes(recipe: Recipe, coded: Mapping[str, Int8Weight], rounding: Rounding | None) -> tuple[Recipe, Rounding]:
    """The recipe for weights that are int8 already, and how their updates are rounded: at random where nothing is said.

    ValueError where weight_group_size is not that of the weights.
    """
    rule = recipe.projected
    if not isinstance(rule, SimulatedInt8):
        return recipe, rounding or "stochastic"
    for name, weight in coded.items():
        if weight.group != rule.group:
            raise ValueError(f"weight_group_size is {rule.group}, but {name} has codes in groups of {weight.group}")
    plain = InSubspace(rule.subspace, rule.inner, rule.lift)
    return replace(recipe, projected=plain), rounding or ("stochastic" if rule.stochastic else "nearest")


def q_galore(options: Options) -> Recipe:
    projected, rest = bitsandbytes_adam(options)
    coded, group, bits = options.take("proj_quant", (True, 256, 4))
    coded, group = options.take("quant", coded), options.take("quant_group_size", group)
    bits = options.take("quant_n_bit", bits)
    if coded and bits not in (4, 8):
        raise ValueError(f"q_galore's quant_n_bit is {bits}; a basis is stored in 4 or 8 bits")
    storage: dict[str, Any] = {"storage": f"int{bits}", "storage_group": group} if coded else {}
    arguments = galore_arguments(options)
    if arguments["side"] != "std":
        raise ValueError(f"q_galore's proj_type is {arguments['side']!r}; its published code has std alone")
    subspace = leading(options, **arguments, **storage)
    assert isinstance(subspace, DenseBasis)
    subspace.published_codes = options.published
    subspace.be_lazy(
        Lazy(
            threshold=options.take("cos_threshold", 0.4),
            window=options.take("queue_size", 5),
            growth=options.take("gamma_proj", 2),
            measure="published" if options.published else "subspace",
        )
    )
    rule = composed(options, subspace, projected, Backproject(options.take("scale", 0.25)))
    return Recipe(rule, rest, options.take("weight_decay", 0.01))


class CorrectedAdam(Adam):
    """Adam whose direction is measured with its bias correction, as Q-APOLLO takes it from bitsandbytes' step."""

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        return Dense(super().update(compressed, state, param, rates, grad).tensor())


def q_apollo(options: Options) -> Recipe:
    """APOLLO on int8 weights. State is in float32: with tensors of 4096 elements its published code raises an error."""
    betas, eps = tuple(options.take("betas", (0.9, 0.999))), options.take("eps", 1e-8)
    projected = CorrectedAdam(betas, eps, weight_decay_first=False)
    arguments = galore_arguments(options)
    subspace = leading(options, **arguments) if options.take("proj", "random") == "svd" else Gaussian(**arguments)
    lift = ScaledGradient(scale=options.take("scale", 1.0), per=options.take("scale_type", "channel"))
    rule = composed(options, subspace, projected, lift)
    return Recipe(rule, Adam(betas, eps), options.take("weight_decay", 0.01))


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "galore_8bit": galore_8bit,
    "q_galore": q_galore,
    "q_apollo": q_apollo,
}
