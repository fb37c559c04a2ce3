"""Full-size rules under the option names of torch and transformers, and any other optimizer class by its name."""

from __future__ import annotations

from collections.abc import Callable

from lowrank_train.optim.adam_atan2 import AdamAtan2
from lowrank_train.optim.adam_mini import AdamMini
from lowrank_train.optim.library import Library
from lowrank_train.optim.moments import Lion, Momentum
from lowrank_train.optim.muon import Auon, Muon
from lowrank_train.optim.orthogonalize import COEFFICIENTS
from lowrank_train.optim.transform import Transform
from lowrank_train.published.flora import adafactor_of
from lowrank_train.published.options import Options, Recipe, torch_adam


def everywhere(rule: Transform, options: Options) -> Recipe:
    """One rule for all tensors."""
    return Recipe(rule, rule, options.take("weight_decay", 0.0))


def muon(options: Options) -> Recipe:
    """torch.optim.Muon on the projected matrices; AdamW, with `betas` and `eps`, on the rest, at the same lr.

    Hence adjust_lr_fn is match_rms_adamw where the call says nothing; published: original, as torch.
    """
    if tuple(options.take("ns_coefficients", COEFFICIENTS)) != COEFFICIENTS:
        raise ValueError(f"muon's ns_coefficients are {COEFFICIENTS}, and no others")
    adjust = options.take("adjust_lr_fn", "original" if options.published else "match_rms_adamw")
    words = ("original", "match_rms_adamw")
    if adjust is not None and adjust not in words:
        raise ValueError(f"muon's adjust_lr_fn is {adjust!r}; it must be None or one of {', '.join(words)}")
    rule = Muon(
        momentum=options.take("momentum", 0.95),
        nesterov=options.take("nesterov", True),
        steps=options.take("ns_steps", 5),
        adjust_lr="match_rms_adamw" if adjust == "match_rms_adamw" else "original",
    )
    return Recipe(rule, torch_adam(options), options.take("weight_decay", 0.1))


def auon(options: Options) -> Recipe:
    """AuON on the projected matrices; AdamW on the rest."""
    rule = Auon(
        momentum=options.take("momentum", 0.95),
        nesterov=options.take("nesterov", True),
        gamma=options.take("gamma", 1.5),
        form="paper" if options.choose("form", "code", ("code", "paper")) == "paper" else "code",
    )
    return Recipe(rule, torch_adam(options), options.take("weight_decay", 0.0))


def adam_mini(options: Options) -> Recipe:
    """Adam-mini. `dim` and `n_heads` are those of the model; n_kv_heads changes nothing, as in the published code.

    Of its names only those of queries and keys are needed: a matrix that it would not know has a v for each row.
    """
    options.ignore("n_kv_heads", "model_sharding", "verbose")
    dim, heads = options.take("dim", 2048), options.take("n_heads", 32)
    if dim % heads:
        raise ValueError(f"adam_mini's dim is {dim}, which is no multiple of n_heads, {heads}")
    rule = AdamMini(tuple(options.take("betas", (0.9, 0.999))), options.take("eps", 1e-8), head_dim=dim // heads)
    return everywhere(rule, options)


def adam_atan2(options: Options) -> Recipe:
    betas = tuple(options.take("betas", (0.9, 0.999)))
    return everywhere(AdamAtan2(betas, options.take("a", 1.27), options.take("b", 1.0)), options)


def lion(options: Options) -> Recipe:
    return everywhere(Lion(tuple(options.take("betas", (0.9, 0.99)))), options)


def sgd(options: Options) -> Recipe:
    return everywhere(Momentum(options.take("momentum", 0.0), options.take("nesterov", False)), options)


def adafactor(options: Options) -> Recipe:
    """transformers' Adafactor at the lr of the call, which is relative to the weights where published."""
    return everywhere(adafactor_of(options, scale_parameter=options.published), options)


def library(options: Options) -> Recipe:
    """name: a class of torch.optim or pytorch_optimizer. Its own weight_decay, too, is an option of the class."""
    name = options.take("name", None)
    if name is None:
        raise ValueError("library needs name, the name of an optimizer class, such as name='AdaBelief'")
    rule = Library(str(name), options.take_all())
    return Recipe(rule, rule)


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "muon": muon,
    "auon": auon,
    "adam_mini": adam_mini,
    "adam_atan2": adam_atan2,
    "lion": lion,
    "sgd": sgd,
    "adafactor": adafactor,
    "library": library,
}
