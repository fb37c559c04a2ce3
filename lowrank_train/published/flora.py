"""Flora and the Adafactor under it from their published options."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lowrank_train.optim.adafactor import Adafactor
from lowrank_train.optim.flora import Flora
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.sketch import LiftFirst
from lowrank_train.optim.stored import Stored
from lowrank_train.optim.subspace.random import Gaussian
from lowrank_train.optim.transform import Transform
from lowrank_train.published.options import Options, Recipe

NO_RANK = sys.maxsize
"""No matrix is that large, and one that is smaller than its rank is not compressed: the published default, None."""


def refuse_own_rate(options: Options) -> None:
    """The options with which Adafactor chooses its learning rate itself."""
    for name in ("relative_step", "warmup_init"):
        options.refuse(name, "makes the rule choose its own learning rate; give lr and set it to False")


def adafactor_of(options: Options, *, scale_parameter: bool = False) -> Adafactor:
    """The Adafactor of transformers."""
    refuse_own_rate(options)
    return Adafactor(
        eps=tuple(options.take("eps", (1e-30, 1e-3))),
        clip_threshold=options.take("clip_threshold", 1.0),
        decay_rate=options.take("decay_rate", -0.8),
        beta1=options.take("beta1", None),
        scale_parameter=options.take("scale_parameter", scale_parameter),
    )


def flora(options: Options) -> Recipe:
    refuse_own_rate(options)
    quantised = options.take("quantization", False)
    if quantised and options.published:
        raise ValueError(
            "flora: quantization cannot be run as published: neither its code book nor its blocks are known; "
            "leave published out, or set it to False"
        )
    if not options.take("factorize_second_moment", True):
        raise ValueError("flora: factorize_second_moment=False is not available; leave it True")
    accumulates = options.method == "flora_accum"
    rank = options.take("rank", None if options.published else 16)
    rank = NO_RANK if rank is None else rank
    beta1 = options.take("beta1", None if options.published or accumulates else 0.9)
    whole = Flora(
        rank=rank,
        kappa=options.take("kappa", 1000),
        beta1=beta1,
        eps=tuple(options.take("eps", (1e-30, 1e-3))),
        clip_threshold=options.take("clip_threshold", 1.0),
        decay_rate=options.take("decay_rate", -0.8),
        scale_parameter=options.take("scale_parameter", True),
    )
    rule: Transform = Stored(whole) if quantised else whole
    decay, accumulation = options.take("weight_decay", 0.0), options.take("accumulation", 1)
    if (accumulation == 1 and not accumulates) or rank == NO_RANK:
        return Recipe(rule, rule, decay)
    if not beta1:
        rule = Adafactor(whole.eps, whole.clip_threshold, whole.decay_rate, scale_parameter=whole.scale_parameter)
    projected = InSubspace(Gaussian(rank=rank, every=1), rule, LiftFirst())
    return Recipe(projected, rule, decay, micro_batches=accumulation)


METHODS: dict[str, Callable[[Options], Recipe]] = {"flora": flora, "flora_accum": flora}
