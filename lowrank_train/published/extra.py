"""Methods without code to replay, from their papers' options: GaLore+, GRASS, SubTrack++, Trion, GoLore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject, Lift, ScaledResidual
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.orthogonalize import Orthogonalized
from lowrank_train.optim.sparse_residual import SparseResidual
from lowrank_train.optim.subspace.coordinates import Coordinates, SampledLines
from lowrank_train.optim.subspace.cross_head import CrossHead
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.geodesic import Geodesic
from lowrank_train.optim.subspace.random import SvdThenRandom
from lowrank_train.published.options import Options, Recipe, galore_arguments, torch_adam, transformers_adam


def refuse_replay(options: Options, why: str) -> None:
    """There is nothing that published=True could mean."""
    if options.published:
        raise ValueError(f"{options.method} cannot be run as published: {why}; leave published out")


def galore_plus(options: Options) -> Recipe:
    refuse_replay(options, "there is no published code")
    adam = transformers_adam(options)
    heads = {name: options.take(name, default) for name, default in (("head_dim", 64), ("iterations", 1))}
    for name in ("row_heads", "column_heads"):
        patterns = options.take(name, None)
        heads |= {} if patterns is None else {name: list(patterns)}
    subspace = CrossHead(**galore_arguments(options), **heads)
    scale, share = options.take("scale", 0.25), options.take("residual_share", 0.01)
    warmup = options.take("residual_warmup", 100)
    lift: Lift = Backproject(scale)
    if share:
        lift = SparseResidual(scale, share, warmup, adam.betas, adam.eps, adam.eps_inside)
    return Recipe(InSubspace(subspace, adam, lift), adam, options.take("weight_decay", 0.0))


def grass(options: Options) -> Recipe:
    refuse_replay(options, "there is no published code")
    adam = torch_adam(options)
    kind = options.choose("proj_type", "topr", ("topr", "uniform", "multinomial_norm"))
    arguments: dict[str, Any] = {
        "rank": options.take("rank", 128),
        "density": None,
        "every": options.take("update_proj_gap", 200),
        "of": options.choose("of", "rows", ("rows", "columns")),
    }
    if kind == "multinomial_norm":
        subspace: Coordinates = SampledLines(**arguments)
    else:
        subspace = Coordinates(**arguments, choose="top" if kind == "topr" else "random")
    lift = Backproject(options.take("scale", 0.25))
    return Recipe(InSubspace(subspace, adam, lift, "reset"), adam, options.take("weight_decay", 0.0))


def subtrack(options: Options) -> Recipe:
    refuse_replay(options, "the code's basis does not move for tall and square matrices")
    adam = transformers_adam(options)
    rotating = replace(adam, rotation="uncorrected")
    subspace = Geodesic(
        rank=options.take("rank", 128),
        every=options.take("subspace_update_interval", 200),
        side=options.take("proj_type", "std"),
        step_size=options.take("st_init_step_size", 10.0),
    )
    scale = options.take("scale", 0.25)
    lift: Lift = ScaledResidual(scale) if options.take("recovery_scaling", True) else Backproject(scale)
    on_refresh: Any = "rotate" if options.take("adaptive_optimizer", True) else "keep"
    return Recipe(InSubspace(subspace, rotating, lift, on_refresh), adam, options.take("weight_decay", 0.0))


def trion(options: Options) -> Recipe:
    """The code chooses columns by their sum of sizes, and cosines as columns or rows by the side; here neither."""
    refuse_replay(options, "the code does not run")
    adjustments: dict[str, Any] = {"kj": "original", "kimi": "match_rms_adamw", "dion": "dion", "none": "none"}
    kind = options.choose("scaling_type", "kj", tuple(adjustments))
    inner = Orthogonalized(options.take("ns_steps", 5), adjustments[kind])
    subspace = Dct(rank=options.take("rank", 128))
    feedback = ErrorFeedback(retained=options.take("momentum", 0.95))
    adam = Adam(tuple(options.take("betas", (0.9, 0.95))), options.take("eps", 1e-10))
    projected = InSubspace(subspace, inner, Backproject(1.0), "keep", feedback)
    return Recipe(projected, adam, options.take("weight_decay", 0.0))


def golore(options: Options) -> Recipe:
    refuse_replay(options, "the code at hand does not keep the rotated moment")
    adam = transformers_adam(options)
    subspace = SvdThenRandom(**galore_arguments(options), random_from=options.take("rand_epoch", 5000))
    lift = Backproject(options.take("scale", 0.25))
    return Recipe(InSubspace(subspace, adam, lift, "rotate"), adam, options.take("weight_decay", 0.0))


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "galore_plus": galore_plus,
    "grass": grass,
    "subtrack": subtrack,
    "trion": trion,
    "golore": golore,
}
