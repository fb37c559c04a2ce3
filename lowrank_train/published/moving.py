"""Methods whose basis moves at every update, or may: Online Subspace Descent, LDAdam, DCT-AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject, Lift, SignOfBackprojection
from lowrank_train.optim.moments import Adam, Lion
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.subspace.power import Power
from lowrank_train.optim.subspace.random import Orthonormal
from lowrank_train.optim.transform import Transform
from lowrank_train.published.options import SIDES, Options, Recipe, leading, torch_adam, transformers_adam

Learner = Literal["adamw", "adam8bit", "adafactor", "lion", "sgd"]
LEARNERS: dict[str, Learner] = {
    "continuous": "adamw",
    "continuous_adamw": "adamw",
    "continuous_adam8bit": "adam8bit",
    "continuous_adafactor": "adafactor",
    "continuous_lion": "lion",
    "continuous_sgd": "sgd",
}


def learned_subspace(options: Options, default: str) -> Subspace:
    """Trained where proj_type says continuous; that code also has GaLore's, and random ones."""
    kind = options.choose("proj_type", default, [*LEARNERS, *SIDES, "random"])
    rank, every = options.take("rank", 128), options.take("update_proj_gap", 200)
    options.ignore("names")  # for its log
    if kind == "random":
        return Orthonormal(rank=rank, every=every)
    if kind not in LEARNERS:
        return leading(options, rank=rank, every=every, side=kind)
    return online(options, kind, rank=rank, every=every)


def online(options: Options, kind: str, **arguments: Any) -> Online:
    """The basis that learns by the rule which proj_type names, with the defaults of torch and bitsandbytes for it."""
    arguments |= {"rule": LEARNERS[kind], "weight_decay": 0.01 if LEARNERS[kind] == "adamw" else 0.0}
    if not options.published:
        return Online(**arguments)
    subspace = Online(**arguments, signs="raw", precision="float32")
    if kind == "continuous_adam8bit":
        subspace.learner = Stored(Adam(), Storage(keep_nonzero=False, table=True))
    return subspace


def learned(options: Options, inner: Transform, rest: Transform, lift: Lift, default: str) -> Recipe:
    base_lr = options.take("constructor_lr", None)  # what the rate of the basis is measured by
    projected = InSubspace(learned_subspace(options, default), inner, lift)
    return Recipe(projected, rest, options.take("weight_decay", 0.0), base_lr=base_lr)


def online_subspace(options: Options) -> Recipe:
    adam = transformers_adam(options)
    return learned(options, adam, adam, Backproject(options.take("scale", 0.25)), "continuous")


def lion_of_whole(options: Options, default: str) -> Recipe:
    """Lion in the subspace, whose sign is taken of the whole matrix, so that `scale` changes nothing."""
    betas = tuple(options.take("betas", (0.9, 0.99)))
    options.ignore("scale")
    inner = Lion(betas, signed=False, weight_decay_first=False)
    return learned(options, inner, Lion(betas, weight_decay_first=False), SignOfBackprojection(), default)


def ldadam(options: Options) -> Recipe:
    betas = tuple(options.take("betas", (0.908, 0.99)))
    eps, decay = options.take("eps", 1e-8), options.take("weight_decay", 0.0)
    options.choose("proj_type", "std", ("std",))
    words: dict[str, Literal["power", "svd", "svd_lowrank"]] = {
        "power_iteration": "power",
        "svd": "svd",
        "svd_lowrank": "svd_lowrank",
    }
    found = options.choose("proj_method", "power_iteration", tuple(words))
    subspace = Power(
        rank=options.take("rank", 16),
        side="std_left",
        rho=options.take("rho", 0.908),
        beta1=betas[0],
        find_by=words[found],
        precision="float32" if options.published else "wide",
    )
    feedback = ErrorFeedback(betas[0] / (1 - betas[0])) if options.take("error_feedback", True) else None
    inner = Adam(betas, eps, rotation="statistical")
    return Recipe(InSubspace(subspace, inner, Backproject(1.0), "rotate", feedback), Adam(betas, eps), decay)


def dct_adamw(options: Options) -> Recipe:
    adam = torch_adam(options)
    options.choose("proj", "dct", ("dct",))
    quantised = options.take("q_ef", False)
    if quantised and options.published:
        raise ValueError(
            "dct_adamw: q_ef cannot be run as published: that code's 4-bit codes come back in another order, and its "
            "8-bit codes use 16 of 256 levels; leave published out, or set q_ef to False"
        )
    options.refuse("distributed", "is not an option here: shard with the trainer; set it to False")
    makhoul = options.choose("sim_type", "matmul" if options.published else "makhoul", ("matmul", "makhoul"))
    norm = options.take("ell_norm", 1 if options.published else 2)
    if makhoul == "makhoul" and options.published:
        norm = -1 if norm < 0 else 1  # that branch takes the norm 1 whatever ell_norm says
    ours: Literal["dct2", "dct3"] = "dct2" if makhoul == "makhoul" else "dct3"
    published: Literal["published", "published_dct2"] = "published_dct2" if makhoul == "makhoul" else "published"
    subspace = Dct(
        rank=options.take("rank", 128),
        every=options.take("update_proj_gap", 1),
        basis=published if options.published else ours,
        norm=norm,
        first_then_multiples=options.published,
        order="topk" if options.published else "index",
    )
    rotate = options.take("rotate_subspace", not options.published)
    feedback = ErrorFeedback(storage="int8" if quantised else "state") if options.take("use_ef", False) else None
    if quantised and feedback is None:
        raise ValueError("dct_adamw: q_ef is how the error is stored, and use_ef is False; set it to True")
    projected = InSubspace(subspace, adam, Backproject(1.0), "rotate" if rotate else "keep", feedback)
    decay, max_size = options.take("weight_decay", 0.0), options.take("max_shape", 32_000)
    return Recipe(projected, adam, decay, max_size=max_size)


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "online_subspace": online_subspace,
    "online_subspace_lion": lambda options: lion_of_whole(options, "continuous"),
    "galore_lion": lambda options: lion_of_whole(options, "std"),
    "ldadam": ldadam,
    "dct_adamw": dct_adamw,
}
