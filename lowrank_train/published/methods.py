"""GaLore and its nearest relatives from their published options: the one place where their names become ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject, ScaledGradient, ScaledResidual
from lowrank_train.optim.moments import RmsProp
from lowrank_train.optim.natural import NaturalAdam
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.random import Gaussian
from lowrank_train.optim.weight_norm import WeightNorm, WeightNormAdam
from lowrank_train.published.flora import adafactor_of
from lowrank_train.published.moving import online
from lowrank_train.published.options import Options, Recipe, galore_arguments, leading, torch_adam, transformers_adam

ONLINE = ("online_galore", "online_natural_galore")


def adamw(options: Options) -> Recipe:
    adam = torch_adam(options)
    return Recipe(adam, adam, options.take("weight_decay", 0.01))


def galore(options: Options) -> Recipe:
    adam = transformers_adam(options)
    rule = InSubspace(leading(options, **galore_arguments(options)), adam, Backproject(options.take("scale", 0.25)))
    return Recipe(rule, adam, options.take("weight_decay", 0.0))


def galore_adafactor(options: Options) -> Recipe:
    rule = adafactor_of(options, scale_parameter=options.published)
    subspace = leading(options, **galore_arguments(options))
    projected = InSubspace(subspace, rule, Backproject(options.take("scale", 0.25)))
    return Recipe(projected, rule, options.take("weight_decay", 0.0))


def natural_galore(options: Options) -> Recipe:
    """The published code is a Tucker decomposition of both sides; the paper compresses one.

    With online_ the basis learns as in Online Subspace Descent: `constructor_lr` is what its rate is measured by.
    """
    kind = options.choose("proj_type", "natural_galore", ("natural_galore", "galore", *ONLINE))
    adam = transformers_adam(options)
    history, damping = options.take("natural_history", 20), options.take("natural_lambda", 1e-3)
    inner = NaturalAdam(**vars(adam), history=history, damping=damping) if "natural" in kind else adam
    arguments = {"rank": options.take("rank", 128), "every": options.take("update_proj_gap", 200)}
    base_lr = options.take("constructor_lr", None)
    if kind in ONLINE:
        if options.published:
            raise ValueError(
                f"natural_galore's proj_type {kind} cannot be run as published: by which loss that code's two factors "
                "learn is not known; leave published out, and one side learns by the loss of Online Subspace Descent"
            )
        subspace: Subspace = online(options, "continuous", **arguments)
    else:
        subspace = leading(options, side="full" if options.published else "std", **arguments)
    projected = InSubspace(subspace, inner, Backproject(options.take("scale", 0.25)))
    return Recipe(projected, adam, options.take("weight_decay", 0.0), base_lr=base_lr)


def fira_lift(options: Options) -> ScaledResidual:
    """A float32 basis is orthonormal to 1e-7: what is replayed forms the residual as the published code does."""
    return ScaledResidual(options.take("alpha", 0.25), residual_norm="whole" if options.published else "lines")


def fira(options: Options) -> Recipe:
    adam = transformers_adam(options)
    rule = InSubspace(leading(options, **galore_arguments(options)), adam, fira_lift(options))
    return Recipe(rule, adam, options.take("weight_decay", 0.0))


def fira_rmsprop(options: Options) -> Recipe:
    options.refuse("centered", "is not available; set it to False")
    options.ignore("weight_decay")  # the published code takes it and does not use it
    rule = RmsProp(options.take("beta", 0.9), options.take("eps", 1e-6), options.take("momentum", 0.0))
    subspace = leading(options, **galore_arguments(options))
    return Recipe(InSubspace(subspace, rule, fira_lift(options)), rule)


def apollo(options: Options) -> Recipe:
    adam = transformers_adam(options)
    arguments = galore_arguments(options)
    decomposed = options.choose("proj", "random", ("random", "svd")) == "svd"
    lift = ScaledGradient(
        scale=options.take("scale", 1.0),
        per="channel" if options.choose("scale_type", "channel", ("channel", "tensor")) == "channel" else "tensor",
        scale_first=options.take("scale_front", False),
        limited=not options.take("disable_nl", False),
    )
    subspace = leading(options, **arguments) if decomposed else Gaussian(**arguments)
    return Recipe(InSubspace(subspace, adam, lift), adam, options.take("weight_decay", 0.0))


def gradnormlorp(options: Options) -> Recipe:
    adam = transformers_adam(options)
    arguments: dict[str, Any] = {"betas": adam.betas, "eps": adam.eps, "correct_bias": adam.correct_bias}
    lift = WeightNorm(options.take("scale", 0.25), **arguments)
    projected = InSubspace(leading(options, **galore_arguments(options)), adam, lift)
    # the published code renormalises every parameter, vectors included, which only costs time
    rest = WeightNormAdam(**arguments) if options.published else adam
    return Recipe(projected, rest, options.take("weight_decay", 0.0))


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "adamw": adamw,
    "galore": galore,
    "galore_adafactor": galore_adafactor,
    "natural_galore": natural_galore,
    "fira": fira,
    "fira_rmsprop": fira_rmsprop,
    "apollo": apollo,
    "gradnormlorp": gradnormlorp,
}
