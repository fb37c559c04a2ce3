"""Cross-entropy of a linear head without ever holding all logits: the sum over targets, in chunks of positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, so no chunk of logits is made twice.

    Logits are multiplied in the dtype of the inputs and summed up in float32: the loss in bfloat16 alone is wrong in
    the second digit. As in liger-kernel's fused linear cross-entropy, the price is that both gradients exist from the
    forward pass on.
    """

    @staticmethod
    def forward(ctx: Any, hidden_PH: Tensor, weight_VH: Tensor, targets_P: Tensor, chunk_positions: int) -> Tensor:
        wants = hidden_PH.requires_grad or weight_VH.requires_grad
        grad_hidden = torch.empty_like(hidden_PH) if wants else None
        grad_weight = torch.zeros_like(weight_VH) if wants else None
        total = torch.zeros((), dtype=torch.promote_types(hidden_PH.dtype, torch.float32), device=hidden_PH.device)
        for start in range(0, len(targets_P), chunk_positions):
            part = slice(start, start + chunk_positions)
            logits = hidden_PH[part].mm(weight_VH.T).to(total.dtype)
            log_partition = torch.logsumexp(logits, 1)
            chosen = logits.gather(1, targets_P[part, None]).squeeze(1)
            total += (log_partition - chosen).sum()
            if grad_hidden is not None and grad_weight is not None:
                logits.sub_(log_partition[:, None]).exp_()  # probabilities
                logits.scatter_add_(1, targets_P[part, None], logits.new_full((len(chosen), 1), -1.0))
                grad_logits = logits.to(hidden_PH.dtype)
                torch.mm(grad_logits, weight_VH, out=grad_hidden[part])
                grad_weight.addmm_(grad_logits.T, hidden_PH[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_output,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output.to(grad_hidden.dtype)
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), None, None


def linear_cross_entropy_sum(
    hidden_PH: Tensor,  # (positions, hidden size)
    weight_VH: Tensor,  # (vocabulary, hidden size)
    targets_P: Tensor,  # (positions,), every one a valid class
    *,
    chunk_positions: int,
) -> Tensor:
    """-sum log softmax(hidden @ weight.T)[target], a float32 (or float64) scalar; differentiable once."""
    if torch.is_autocast_enabled(hidden_PH.device.type):
        dtype = torch.get_autocast_dtype(hidden_PH.device.type)
        hidden_PH, weight_VH = hidden_PH.to(dtype), weight_VH.to(dtype)
    result: Tensor = _LinearCrossEntropy.apply(hidden_PH, weight_VH.to(hidden_PH.dtype), targets_P, chunk_positions)
    return result
