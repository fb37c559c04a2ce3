"""What a built strategy lacks for the way in which devices work together, where its configuration does not show it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_train.config.errors import UserError
from lowrank_train.config.fsdp_checks import OTHERWISE as IN_WHOLE
from lowrank_train.config.fsdp_checks import sharded
from lowrank_train.config.parallel_checks import replicated
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.strategy_checks import micro_batches, world_size
from lowrank_train.config.zero_checks import OTHERWISE, zero_stage
from lowrank_train.models import around_blocks, blocks_of, meta_model, outputs_of
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.activity import is_trainable
from lowrank_train.optim.blocks import Blocks
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.stored import Stored
from lowrank_train.optim.transform import Transform
from lowrank_train.strategy import Strategy

STAND_IN_VOCABULARY = 64  # before the tokenizer is read; no fault depends on it
ALONE = "use trainer.devices=1 trainer.num_nodes=1"


def refuse_parallel(config: RunConfig) -> None:
    """UserError, before anything is read or written, for a strategy that cannot be trained as the rest says."""
    alone = world_size(config) == 1 and config.trainer.strategy == "auto"
    if alone and config.strategy.when == "after_backward":  # which everything can do whose parts go together
        put_together(config)
        return
    model = meta_model(
        config.model,
        vocab_size=config.model.vocab_size or STAND_IN_VOCABULARY,
        dtype=getattr(torch, config.precision.weights),
        outputs=outputs_of(config.data),
    )
    faults = refusals(config, prepared(config, model), model)
    if faults:
        raise UserError(faults)


def put_together(config: RunConfig) -> Strategy:
    """The memory strategy of a run. UserError for parts that do not fit each other."""
    return Strategy.from_config(
        config.strategy,
        state_dtype=getattr(torch, config.precision.state),
        seed=config.seed,
        rounding=config.precision.rounding,
        int8_group=config.precision.int8_group,
        steps=config.trainer.steps,
    )


def prepared(config: RunConfig, model: PreTrainedModel) -> Strategy:
    """The memory strategy, with the model brought into the form it trains. UserError for what does not fit."""
    strategy = put_together(config)
    strategy.prepare(model)
    return strategy


def refusals(config: RunConfig, strategy: Strategy, model: PreTrainedModel) -> list[str]:
    """Why `strategy`, which has prepared `model`, cannot be trained so; also on the meta device. Sets its moment."""
    strategy.when = config.strategy.when
    try:
        strategy.optimizer(
            model,
            lr=config.optim.lr,
            grad_clip=config.optim.grad_clip,
            clip_norm_of=config.optim.clip_norm_of,
            micro_batches=micro_batches(config),
        )
    except UserError as error:
        return error.faults
    return list(parallel_misfits(config, strategy, model))


def parallel_misfits(config: RunConfig, strategy: Strategy, model: nn.Module) -> Iterator[str]:
    """What the way of working together has against it."""
    if world_size(config) > 1:
        yield from _restructuring(config, strategy)
        yield from _nothing_in_common(model)
        yield from _reduced_in_vain(config, strategy)
    if zero_stage(config) is not None:
        yield from _zero(config, strategy, model)
    if sharded(config):
        yield from _rows(strategy, model)


def _restructuring(config: RunConfig, strategy: Strategy) -> Iterator[str]:
    names = [event.name for event in strategy.events if event.restructures]
    if names and not replicated(config):
        yield (
            f"trainer.devices: strategy {strategy.name} changes what is trained in the middle of a run "
            f"({', '.join(names)}), and {world_size(config)} devices cut up and gather what was there at its start; "
            f"use {IN_WHOLE}"
        )


def _reduced_in_vain(config: RunConfig, strategy: Strategy) -> Iterator[str]:
    """Subspaces that need the whole mean gradient at every update."""
    rule = strategy.selected.rule if isinstance(strategy.selected, Blocks) else strategy.selected
    if config.trainer.reduce != "projected" or not isinstance(rule, InSubspace):
        return
    reason = None
    if rule.needs_gradient:
        reason = f"the lift {type(rule.lift).__name__} uses what the subspace leaves out of the gradient"
    elif rule.subspace.always_moves:
        reason = f"the subspace {type(rule.subspace).__name__} moves by it at every update"
    if reason is not None:
        yield (
            f"trainer.reduce=projected: {reason}, so that the whole gradient would travel each time; use "
            "trainer.reduce=gradients"
        )


def _nothing_in_common(model: nn.Module) -> Iterator[str]:
    """Layers that differ from rank to rank, with nothing beside them that is averaged."""
    local = rank_local_names(model)
    if local and not any(is_trainable(param) for name, param in model.named_parameters() if name not in local):
        yield (
            "nothing that the devices have in common is trained, and DDP needs some of it; train more with them, "
            f"such as with strategy.freeze_rest=false, or {ALONE}"
        )


def rank_local_names(model: nn.Module) -> set[str]:
    """The parameters whose values differ from rank to rank."""
    return {f"{path}.{name}" for path, layer in layers_of(model).items() for name in layer.rank_local()}


def _rows(strategy: Strategy, model: nn.Module) -> Iterator[str]:
    """Layers that cannot lie in rows on several devices, be gathered a block at a time, or change one by one."""
    key = f"trainer.strategy=fsdp: strategy {strategy.name}"
    if rank_local_names(model):
        yield f"{key} has weights of each device's own, and all devices share one set; use {IN_WHOLE}"
    scalars = [name for name, param in model.named_parameters() if param.ndim == 0]
    if scalars:
        yield f"{key} has {scalars[0]}, a single number, which has no rows; use {IN_WHOLE}"
    around = around_blocks(model)
    units = [[param for param in block.parameters() if param not in set(around)] for block in blocks_of(model)]
    for unit in (*units, around):
        dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in unit if is_trainable(param)})
        if len(dtypes) > 1:
            yield f"{key} trains parameters in {' and '.join(dtypes)}, which do not travel together; use {IN_WHOLE}"
            break


def _zero(config: RunConfig, strategy: Strategy, model: nn.Module) -> Iterator[str]:
    """Flat shards of float numbers, with the moments of all tensors in them, are all that an update may need."""
    key = f"trainer.strategy={config.trainer.strategy}"
    rules = {"rest": strategy.rest} | ({} if strategy.selected is None else {"inner": strategy.selected})
    for part, rule in rules.items():
        if not rule.elementwise and not isinstance(rule, InSubspace | Stored):  # which the configuration shows
            yield (
                f"{key}: hands the optimizer flat pieces of many tensors, and {_name(rule)} (strategy.{part}) does not "
                f"go number by number; {OTHERWISE}, or strategy/{part}=adamw"
            )
    if strategy.merge is None and strategy.events:
        yield (
            f"{key}: keeps each device a share of the weights or moments, and strategy {strategy.name} changes whole "
            f"ones between updates ({', '.join(dict.fromkeys(event.name for event in strategy.events))}); {OTHERWISE}"
        )
    if rank_local_names(model):
        yield f"{key}: averages all gradients, and strategy {strategy.name} has weights of each device's own; {ALONE}"
    codes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.is_floating_point()})
    if codes:
        kept = ", ".join(codes)
        yield f"{key}: shares out floats, and strategy {strategy.name} keeps parameters in {kept}; {OTHERWISE}"


def _name(rule: Transform) -> str:
    return type(rule).__name__
