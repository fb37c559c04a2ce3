"""What a device holds under DeepSpeed's ZeRO beside its parts of weights, gradients and state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.memory.counting import bytes_of
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.activity import is_trainable
from lowrank_train.optim.optimizer import TransformOptimizer

if TYPE_CHECKING:
    from lowrank_train.memory.shares import Shares

BUCKET_ELEMENTS = 200_000_000
"""Gradients that travel together: Lightning's choice for DeepSpeed, which has 5e8."""

PERSISTENT_ELEMENTS = 100_000
"""Stage 3 leaves parameters of at most so many numbers whole between two uses: DeepSpeed's own choice."""

PREFETCHED_ELEMENTS = 50_000_000
"""What it gathers ahead of time for the modules that come next: DeepSpeed's own choice too."""


def stays_whole(param: Tensor) -> bool:
    """Whether stage 3 has a parameter whole on every device, but while it is updated."""
    return param.numel() <= PERSISTENT_ELEMENTS


def beside_parts(shares: Shares, model: PreTrainedModel, optimizer: TransformOptimizer, phase: str) -> int:
    """Bytes in a phase. Of stages 1 and 2 the float32 copies; of stage 3 small parameters and the bucket at all times;
    in a pass the module that computes, what is gathered ahead of it, and the head, which the whole pass holds; in
    backward the bucket once more, on its way; in a step a copy of this device's part of the gradients.
    """
    if shares.masters:
        return sum(4 * shares.part_of(param) for param in optimizer.slots)
    if not shares.weights:
        return 0
    params = list(dict.fromkeys(model.parameters()))
    large = {param: bytes_of([param]) for param in params if not stays_whole(param)}
    largest = max(large.values(), default=0)
    trained = [param for param in params if is_trainable(param)]
    always = bytes_of([param for param in params if param not in large]) + 4 * BUCKET_ELEMENTS
    if "step" in phase:
        return always + sum(map(shares.part_bytes, trained))
    if phase == "checkpoint":  # one parameter after the other
        return always + largest
    leaves = [module for module in model.modules() if not any(module.children())]
    modules = [*layers_of(model).values(), *leaves]
    module = max(sum(large.get(param, 0) for param in set(one.parameters())) for one in modules)
    head = model.get_output_embeddings()
    held = 0 if head is None else sum(large.get(param, 0) for param in head.parameters())
    gathered = min(sum(large.values()), held + module + 4 * PREFETCHED_ELEMENTS + largest)
    sent = min(4 * BUCKET_ELEMENTS, bytes_of(trained)) if "backward" in phase else 0
    return always + gathered + sent
