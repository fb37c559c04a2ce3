"""The methods of the GaLore family from their published options: the one place where their names become ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.flora import Flora
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import (
    Backproject,
    Lift,
    ScaledGradient,
    ScaledResidual,
    SignOfBackprojection,
    StateFreeResidual,
)
from lowrank_train.optim.moments import Adafactor, Adam, Lion, Momentum, RmsProp
from lowrank_train.optim.natural import NaturalAdam
from lowrank_train.optim.subspace.coordinates import Coordinates
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.subspace.power import Power
from lowrank_train.optim.subspace.random import Gaussian, Orthonormal
from lowrank_train.optim.transform import Transform
from lowrank_train.published.options import Options, Recipe, galore_arguments, leading, torch_adam, transformers_adam


def galore(options: Options) -> Recipe:
    adam = transformers_adam(options)
    rule = InSubspace(leading(options, **galore_arguments(options)), adam, Backproject(options.take("scale", 0.25)))
    return Recipe(rule, adam, options.take("weight_decay", 0.0))


def adafactor_of(options: Options) -> Adafactor:
    for name in ("relative_step", "warmup_init"):
        if options.take(name, False):
            raise ValueError(f"{name}=True makes Adafactor choose its own learning rate; give lr and set it to False")
    return Adafactor(
        eps=tuple(options.take("eps", (1e-30, 1e-3))),
        clip_threshold=options.take("clip_threshold", 1.0),
        decay_rate=options.take("decay_rate", -0.8),
        beta1=options.take("beta1", None),
        scale_parameter=options.take("scale_parameter", False),
    )


def galore_adafactor(options: Options) -> Recipe:
    rule = adafactor_of(options)
    subspace = leading(options, **galore_arguments(options))
    return Recipe(
        InSubspace(subspace, rule, Backproject(options.take("scale", 0.25))), rule, options.take("weight_decay", 0.0)
    )


def fira_lift(options: Options) -> ScaledResidual:
    """A float32 basis is orthonormal to 1e-7: what is replayed forms the residual as the published code does."""
    return ScaledResidual(options.take("alpha", 0.25), residual_norm="whole" if options.published else "lines")


def natural_galore(options: Options) -> Recipe:
    kind = options.take("proj_type", "natural_galore")
    if kind not in ("galore", "natural_galore"):
        raise ValueError(f"natural_galore's proj_type is {kind!r}; it must be galore or natural_galore")
    adam = transformers_adam(options)
    history, damping = options.take("natural_history", 20), options.take("natural_lambda", 1e-3)
    inner = NaturalAdam(**vars(adam), history=history, damping=damping) if kind == "natural_galore" else adam
    arguments = {"rank": options.take("rank", 128), "every": options.take("update_proj_gap", 200)}
    # the published code is a Tucker decomposition of both sides; the paper compresses one
    subspace = leading(options, side="full" if options.published else "std", **arguments)
    projected = InSubspace(subspace, inner, Backproject(options.take("scale", 0.25)))
    return Recipe(projected, adam, options.take("weight_decay", 0.0))


def fira(options: Options) -> Recipe:
    adam = transformers_adam(options)
    rule = InSubspace(leading(options, **galore_arguments(options)), adam, fira_lift(options))
    return Recipe(rule, adam, options.take("weight_decay", 0.0))


def apollo(options: Options) -> Recipe:
    adam = transformers_adam(options)
    arguments = galore_arguments(options)
    subspace = leading(options, **arguments) if options.take("proj", "random") == "svd" else Gaussian(**arguments)
    lift = ScaledGradient(
        scale=options.take("scale", 1.0),
        per=options.take("scale_type", "channel"),
        scale_first=options.take("scale_front", False),
        limited=not options.take("disable_nl", False),
    )
    return Recipe(InSubspace(subspace, adam, lift), adam, options.take("weight_decay", 0.0))


def frugal_lift(options: Options) -> Lift:
    rule = options.take("inactive_update_rule", "sign_sgd")
    scale, inactive = options.take("proj_params_lr_scale", 1.0), options.take("inactive_lr_scale", 1.0)
    if rule == "no":
        return Backproject(scale)
    return StateFreeResidual(scale, "sgd" if rule == "sgd" else "sign", inactive)


def frugal(options: Options, inner: Transform | None = None) -> Recipe:
    rule = torch_adam(options) if inner is None else inner
    kind = options.take("proj_type", "svd")
    arguments = {
        "rank": None,
        "density": options.take("density", 0.25),
        "every": options.take("update_gap", 200),
        "side": options.take("proj_side", "std"),
    }
    subspace = Orthonormal(**arguments) if kind == "random" else leading(options, **arguments)
    on_refresh: Any = "reset" if options.take("reset_statistics", True) else "keep"
    projected = InSubspace(subspace, rule, frugal_lift(options), on_refresh)
    return Recipe(projected, rule, options.take("weight_decay", 0.0))


def frugal_coord(options: Options) -> Recipe:
    rule = torch_adam(options)
    of: Any = {"columns": "columns", "rows": "rows", "randk": "entries"}[options.take("coord_choice", "columns")]
    subspace = Coordinates(every=options.take("update_gap", 200), density=options.take("density", 0.25), of=of)
    on_refresh: Any = "reset" if options.take("reset_statistics", True) else "keep"
    return Recipe(InSubspace(subspace, rule, frugal_lift(options), on_refresh), rule, options.take("weight_decay", 0.0))


def online_subspace(options: Options, inner: Transform | None = None) -> Recipe:
    arguments = galore_arguments(options)
    kind = arguments.pop("side")
    options.take("names", None)
    options.take("constructor_lr", None)
    inner = transformers_adam(options) if inner is None else inner
    learner: Any = next((name for name in ("sgd", "lion") if name in kind), "adamw")
    scale = options.take("scale", 0.25)
    lift: Lift = SignOfBackprojection() if isinstance(inner, Lion) else Backproject(scale)
    rest = Lion(inner.betas, weight_decay_first=False) if isinstance(inner, Lion) else inner
    return Recipe(
        InSubspace(Online(rule=learner, weight_decay=0.01 if learner == "adamw" else 0.0, **arguments), inner, lift),
        rest,
        options.take("weight_decay", 0.0),
    )


def ldadam(options: Options) -> Recipe:
    betas = tuple(options.take("betas", (0.908, 0.99)))
    eps, decay = options.take("eps", 1e-8), options.take("weight_decay", 0.0)
    find_by: Any = {"power_iteration": "power", "svd": "svd"}[options.take("proj_method", "power_iteration")]
    subspace = Power(
        rank=options.take("rank", 16),
        side="std_left",
        rho=options.take("rho", betas[0]),
        find_by=find_by,
        precision="float32" if options.published else "wide",
    )
    feedback = ErrorFeedback(betas[0] / (1 - betas[0])) if options.take("error_feedback", True) else None
    inner = Adam(betas, eps, rotation="statistical")
    return Recipe(InSubspace(subspace, inner, Backproject(1.0), "rotate", feedback), Adam(betas, eps), decay)


def dct_adamw(options: Options) -> Recipe:
    adam = torch_adam(options)
    if options.take("proj", "dct") != "dct":
        raise ValueError("dct_adamw's proj is dct; for other bases use another method")
    subspace = Dct(
        rank=options.take("rank", 128),
        every=options.take("update_proj_gap", 1),
        basis="published" if options.published else "dct2",
        norm=1 if options.published else 2,
        first_then_multiples=options.published,
        order="topk" if options.published else "index",
    )
    on_refresh: Any = "rotate" if options.take("rotate_subspace", not options.published) else "keep"
    feedback = ErrorFeedback() if options.take("use_ef", False) else None
    projected = InSubspace(subspace, adam, Backproject(1.0), on_refresh, feedback)
    return Recipe(projected, adam, options.take("weight_decay", 0.0))


def fira_rmsprop(options: Options) -> Recipe:
    if options.take("centered", False):
        raise ValueError("fira_rmsprop has no centered form; set centered to False")
    options.take("weight_decay", 0.0)  # accepted and ignored by the published code
    rule = RmsProp(options.take("beta", 0.9), options.take("eps", 1e-6), options.take("momentum", 0.0))
    subspace = leading(options, **galore_arguments(options))
    return Recipe(InSubspace(subspace, rule, fira_lift(options)), rule)


def flora(options: Options) -> Recipe:
    for name in ("relative_step", "warmup_init"):
        if options.take(name, False):
            raise ValueError(f"{name}=True makes Flora choose its own learning rate; give lr and set it to False")
    rule = Flora(
        rank=options.take("rank", 16),
        kappa=options.take("kappa", 1000),
        beta1=options.take("beta1", 0.9),
        eps=tuple(options.take("eps", (1e-30, 1e-3))),
        clip_threshold=options.take("clip_threshold", 1.0),
        decay_rate=options.take("decay_rate", -0.8),
        scale_parameter=options.take("scale_parameter", True),
    )
    return Recipe(rule, rule, options.take("weight_decay", 0.0))


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "galore": galore,
    "galore_adafactor": galore_adafactor,
    "fira": fira,
    "apollo": apollo,
    "frugal": frugal,
    "frugal_coord": frugal_coord,
    "frugal_lion": lambda options: frugal(options, Lion(tuple(options.take("betas", (0.9, 0.99))))),
    "frugal_sgd": lambda options: frugal(options, Momentum(options.take("momentum", 0.0))),
    "fira_rmsprop": fira_rmsprop,
    "flora": flora,
    "natural_galore": natural_galore,
    "ldadam": ldadam,
    "dct_adamw": dct_adamw,
    "online_subspace": online_subspace,
    "online_subspace_lion": lambda options: online_subspace(
        options, Lion(tuple(options.take("betas", (0.9, 0.99))), signed=False, weight_decay_first=False)
    ),
}
