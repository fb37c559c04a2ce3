"""What the rules work on: the parameters of the model themselves, unless these are cut up among processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lowrank_train.optim.groups import Group
from lowrank_train.optim.transform import State, Transform
from lowrank_train.optim.update_stats import norm, total_norm

if TYPE_CHECKING:
    from lowrank_train.optim.optimizer import TransformOptimizer


class Served:
    """Each parameter is served itself, and all there is to know of it is here.

    An optimizer's slots, state and groups are those of the served tensors.
    """

    gradients_share_memory = False  # so that one of them keeps that of others alive

    def take_in(self, groups: list[Group]) -> list[Group]:
        """The groups, of the tensors that are served from now on."""
        return groups

    def served(self, param: Tensor) -> Tensor:
        """The tensor that is served for a parameter of the model."""
        return param

    def parameter(self, tensor: Tensor) -> Tensor:
        """The parameter of the model that a served tensor stands for."""
        return tensor

    def like(self, tensor: Tensor) -> Tensor:
        """Something of the parameter's whole shape, dtype and device, for rules that make a state."""
        return tensor

    def is_here(self, tensor: Tensor) -> bool:
        """Whether the tensor can be worked on at any time, and not just in its round."""
        return True

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether this process keeps state of this tensor."""
        return True

    def keep_own(self, tensor: Tensor, rule: Transform, state: State) -> None:
        """Of a state that was made for the whole parameter, leave what this process keeps."""

    def as_saved(self, tensor: Tensor, rule: Transform, state: State) -> State:
        """The state as it goes into a checkpoint."""
        return state

    def from_saved(self, tensor: Tensor, rule: Transform, state: State) -> State:
        """Of a state out of a checkpoint, what this process keeps."""
        return state

    def masking(
        self, tensor: Tensor, rule: Transform, state: State, keep: Callable[[str, Tensor], Tensor]
    ) -> Callable[[str, Tensor], Tensor]:
        """`keep`, which is to see whole moments, for the moments of this process."""
        return keep

    def is_due(self, optimizer: TransformOptimizer, tensor: Tensor) -> bool:
        """Whether the next compression moves the tensor's basis."""
        rule = optimizer.transform_of[tensor]
        return rule.compresses and rule.refresh_due(optimizer._state(tensor))

    def set_apart(self, tensor: Tensor) -> None:
        """Let the gradient, which stays for now, keep no memory of others alive."""

    def norms(self, optimizer: TransformOptimizer, tensors: list[Tensor]) -> list[Tensor]:
        """The norms of the gradients at hand, compressed ones where the whole ones are gone; 0-dimensional."""
        return [norm(optimizer._pending[tensor] if tensor.grad is None else tensor.grad) for tensor in tensors]

    def total_low_norm(self, optimizer: TransformOptimizer) -> float:
        """The norm of all compressed gradients of this update."""
        return total_norm(optimizer._current.low_norms)

    def finish(self, optimizer: TransformOptimizer) -> None:
        """An update is over, and its statistics are about to be read."""

    def free_gradients(self) -> None:
        """Drop what gradients there are besides those of the served tensors."""
