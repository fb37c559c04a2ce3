"""Small tensors that one rule serves are stepped in one launch, which costs more than their numbers do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_train.optim.moments import Adam, fits_fused
from lowrank_train.optim.transform import Rates, counter, multiply_, tensor_of

if TYPE_CHECKING:
    from lowrank_train.optim.optimizer import TransformOptimizer

SMALL = 2**16
"""Numbers up to which a tensor joins others: 65,536 are read and written in a microsecond, less than a launch takes."""

Ready = list[tuple[Tensor, dict[str, Any]]]


def step_small(optimizer: TransformOptimizer, ready: Ready, grad_factor: float) -> Ready:
    """Update what Adam serves whole and torch's fused kernel takes as a list; returns what is left to update.

    Norms and biases are what this is about, of which a model has two or more a layer. The numbers are those of one
    update each, bit for bit: the kernel treats every tensor by itself.
    """
    rounded = optimizer.rounded_weights.rounding != "nearest" or optimizer.rounded_weights.count_lost
    batches: dict[tuple[Any, ...], list[Tensor]] = {}
    left: Ready = []
    for param, group in ready:
        rule = optimizer.transform_of[param]
        narrow = param.dtype is torch.bfloat16 and rounded
        plain = optimizer.ranks.is_here(param) and type(param) in (Tensor, nn.Parameter)
        if type(rule) is Adam and plain and param.numel() <= SMALL and not narrow:
            state = optimizer._state(param)
            assert param.grad is not None, "what is not compressed is a gradient"
            if fits_fused(param, param.grad, tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq")):
                alike = id(rule), id(group), param.dtype, param.device, counter(state, "step")
                batches.setdefault(alike, []).append(param)
                continue
        left.append((param, group))
    groups = {id(group): group for _, group in ready}
    for (_, group_id, *_), params in batches.items():
        _step(optimizer, params, groups[group_id], grad_factor)
    return left


def _step(optimizer: TransformOptimizer, params: list[Tensor], group: dict[str, Any], grad_factor: float) -> None:
    rule = optimizer.transform_of[params[0]]
    assert isinstance(rule, Adam)
    grads = [param.grad for param in params if param.grad is not None]
    for param in params:
        name = optimizer.slots[param].name
        optimizer._current.low_norms[name] = optimizer._current.norms[name]
    if grad_factor != 1.0:
        multiply_(grads, grad_factor)
    rates = Rates(group["lr"], optimizer.base_lr * group["lr_ratio"])
    rule.apply_together(
        grads, [optimizer._state(param) for param in params], params, rates, rates.lr * group["weight_decay"]
    )
