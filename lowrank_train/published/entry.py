"""Every method as a plain torch optimizer, under the option names of its published code."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.activity import is_trainable, put_to_sleep
from lowrank_train.optim.blocks import Blocks
from lowrank_train.optim.groups import Group
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.refusals import When
from lowrank_train.optim.selection import matched_names, slots_for
from lowrank_train.optim.transform import Slot, Transform
from lowrank_train.published import blocks, extra, flora, frugal, library, methods, moving, quantized
from lowrank_train.published.options import Options, Recipe

METHODS: dict[str, Callable[[Options], Recipe]] = {
    **methods.METHODS,
    **moving.METHODS,
    **flora.METHODS,
    **frugal.METHODS,
    **blocks.METHODS,
    **quantized.METHODS,
    **extra.METHODS,
    **library.METHODS,
}
"""Name -> what the method is made of; a family a file."""

BasisSourceByName = Callable[[str, int, Tensor], Any]
"""(parameter name, 1-based update, gradient) -> the basis in force from that update on, or None for one's own."""

DEFAULT_PROJECT = ("*attn*.weight", "*attention*.weight", "*mlp*.weight")
"""Attention and MLP linears, as every paper of the family projects them."""

NamedTensor = tuple[str, Tensor]


def optimizer(
    method: str,
    named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    project: Iterable[str] | None = None,
    published: bool = False,
    basis_source: BasisSourceByName | None = None,
    seed: int = 0,
    when: When = "after_backward",
    grad_clip: float | None = None,
    clip_norm_of: Literal["full", "projected"] = "full",
    micro_batches: int = 1,
    rounding: Rounding | None = None,
    count_lost_updates: bool = False,
    **options: Any,
) -> TransformOptimizer:
    """Any method as a plain torch optimizer; for every update set `lr` (and `weight_decay`) in its param_groups.

    project: names or patterns of the projected matrices; None: the matrices of attention and MLP, or every matrix where
        no name tells them apart. Everything else is trained by the method's full-size rule.
    published: the published code's conventions and defaults: raw signs, exact float32 decompositions, all bases moved
        at once. Otherwise ours: signs aligned, bases found by warm-started iteration and moved in turn.
    basis_source: supplies the basis, random matrix or indices in force from an update on, laid out as that code stores
        them: (R, N) on the right, (M, R) on the left, a pair for both; None from it: the method's own.
    when, grad_clip, clip_norm_of, micro_batches: as TransformOptimizer.
    rounding: of bfloat16 and int8 weights as they are updated: nearest, stochastic or compensated, as RoundedWeights.
        None: int8 weights at random, or as the option stochastic_round says, others to the nearest.
    count_lost_updates: stats["lost_updates_pct"] of every update says how many of them rounding undid.
    options: the options of the published code by their names there. ValueError for one that the method does not have.
    """
    if method not in METHODS:
        nearest = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else "."
        raise ValueError(f"there is no method {method!r}{hint} There are: {', '.join(sorted(METHODS))}")
    recipe = recipe_of(method, options, published)
    pairs = list(named_parameters.named_parameters() if isinstance(named_parameters, nn.Module) else named_parameters)
    pairs = [(name, param) for name, param in pairs if is_trainable(param)]
    coded = {name: param for name, param in pairs if isinstance(param, Int8Weight)}
    if coded:
        recipe, rounding = quantized.on_codes(recipe, coded, rounding)
    chosen = projected_names(pairs, project, recipe)
    subspace = getattr(recipe.projected, "subspace", None)
    if subspace is not None:
        refuse_vectors([pair for pair in pairs if pair[0] in chosen])
        subspace.any_rank = published
    trained, _ = matched_names([name for name, _ in pairs], recipe.trained_rest, "trained_rest")
    for name, param in pairs:
        if name not in chosen | trained:
            put_to_sleep(param)
    groups, slots = [], []
    for group, rule, members in (("projected", recipe.projected, chosen), ("rest", recipe.rest, trained - chosen)):
        params = [pair for pair in pairs if pair[0] in members]
        if params:
            slots = slots_for(params, seed=seed)
            groups.append(Group(group, rule, params, slots))
    if isinstance(recipe.projected, Blocks):
        recipe.projected.seed = seed
    if basis_source is not None:
        replay(recipe.projected, basis_source, [slot for group in groups for slot in group.slots])
    if recipe.micro_batches > 1 and micro_batches == 1:
        when, micro_batches = "project_in_backward", recipe.micro_batches
    try:
        built = TransformOptimizer(
            groups,
            lr=lr,
            weight_decay=recipe.weight_decay,
            when=when,
            grad_clip=grad_clip,
            clip_norm_of=clip_norm_of,
            micro_batches=micro_batches,
            # random bases, the only ones of methods that accumulate on their own, need no whole gradient to move
            basis_under_accumulation="first_micro_batch" if recipe.micro_batches > 1 else "window",
            rounding=rounding or "nearest",
            count_lost_updates=count_lost_updates,
        )
    except ValueError as error:
        raise library_words(error) from None
    if recipe.base_lr is not None:
        built.base_lr = recipe.base_lr
    return built


def recipe_of(method: str, options: dict[str, Any], published: bool) -> Recipe:
    """The method's parts. ValueError for an option that it does not have, or a value that a part refuses."""
    taken = Options(method, options, published)
    try:
        recipe = METHODS[method](taken)
    except ValueError as error:
        raise library_words(error) from None
    taken.finish()
    return recipe


def projected_names(pairs: Sequence[NamedTensor], project: Iterable[str] | None, recipe: Recipe) -> set[str]:
    """The names of what the method's own rule serves. ValueError for a pattern that matches nothing."""
    if project is not None:
        chosen, faults = matched_names([name for name, _ in pairs], project, "project")
        if faults:
            raise ValueError("\n".join(faults))
    elif recipe.project is not None:
        chosen, _ = matched_names([name for name, _ in pairs], recipe.project, "project")
    else:
        matrices = [name for name, param in pairs if param.ndim == 2]
        chosen = matched_names(matrices, DEFAULT_PROJECT, "project")[0] or set(matrices)
    too_large = {name for name, param in pairs if recipe.max_size is not None and max(param.shape) >= recipe.max_size}
    return chosen - too_large


def refuse_vectors(pairs: Sequence[NamedTensor]) -> None:
    """ValueError for what no subspace can take."""
    for name, param in pairs:
        if param.ndim != 2:
            raise ValueError(f"{name} has the shape {tuple(param.shape)}, but only matrices can be projected")


def library_words(error: ValueError) -> ValueError:
    """The same fault without the prefixes that keys have on the command line."""
    text = str(error)
    for prefix in ("strategy.subspace.", "strategy.lift.", "strategy.inner."):
        text = text.replace(prefix, "")
    return ValueError(text)


def replay(rule: Transform, source: BasisSourceByName, slots: Sequence[Slot]) -> None:
    """Ask `source` for every basis first."""
    moving: Any = getattr(rule, "subspace", rule)
    if not hasattr(moving, "source"):
        raise ValueError("basis_source: this method has no basis that could be supplied")
    name_of = {slot.seed: slot.name for slot in slots}

    def basis(seed: int, update: int, grad: Tensor) -> Any:
        given = source(name_of[seed], update, grad)
        if isinstance(given, tuple | list):
            return tuple(torch.as_tensor(part) for part in given)
        return None if given is None else torch.as_tensor(given)

    moving.source = basis
