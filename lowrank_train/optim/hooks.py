"""Hooks that use gradients inside the backward pass: for whole updates, or to compress and free them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from lowrank_train.optim.optimizer import TransformOptimizer


class BackwardHooks:
    """Hands each gradient of an optimizer's parameters over as soon as autograd has added it up.

    when="in_backward": the parameter is updated, while `armed`; else its gradient stays.
    when="project_in_backward": the gradient is compressed, in every micro-batch, where the rule compresses.
    """

    def __init__(self, optimizer: TransformOptimizer) -> None:
        self.armed = False
        self._optimizer = optimizer
        self._hooked = WeakTensorKeyDictionary()  # of parameters: those that are gone must not live on here

    def register(self) -> None:
        """On the parameters that have come into service."""
        when = self._optimizer.when
        if when == "after_backward":
            return
        for param, transform in self._optimizer.transform_of.items():
            hook: Callable[[Tensor], None] | None
            if when == "in_backward":
                hook = self._update
            elif transform.compresses:
                hook = self._compress
            else:
                hook = self._set_apart if self._optimizer.ranks.gradients_share_memory else None
            if hook is not None and param not in self._hooked:
                self._hooked[param] = True
                parameter = self._optimizer.ranks.parameter(param)
                parameter.register_post_accumulate_grad_hook(torch.no_grad()(hook))

    def _update(self, param: Tensor) -> None:
        optimizer = self._optimizer
        param = optimizer.ranks.served(param)
        if not self.armed or param not in optimizer.slots:
            return
        optimizer.ranks.make_one_common(optimizer, param)
        optimizer._measure_one(param)
        if param.grad is not None or param in optimizer._pending:
            for _, group in optimizer.ranks.in_rounds(optimizer, [(param, optimizer._group_of(param))]):
                optimizer._update(param, group, 1.0)
            param.grad = None
            optimizer._pending.pop(param, None)

    def _set_apart(self, param: Tensor) -> None:
        ranks = self._optimizer.ranks
        ranks.set_apart(ranks.served(param))

    def _compress(self, param: Tensor) -> None:
        optimizer = self._optimizer
        param = optimizer.ranks.served(param)
        if optimizer.hold_window and optimizer.ranks.is_due(optimizer, param):
            optimizer.ranks.set_apart(param)  # this window's whole gradient decides the new basis
            return
        if optimizer.micro_batches > 1:
            optimizer._current.norm_known = False
        optimizer.ranks.make_one_common(optimizer, param)
        if param.grad is not None:
            optimizer._measure_one(param)
        if param.grad is not None:
            for _ in optimizer.ranks.in_rounds(optimizer, [(param, {})], updating=False):
                optimizer._compress(param)
