"""AdaLoRA's allocation of ranks over PEFT's layers, its memory in buffers, so that a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_train.nn.events import Action, Event, Moments

if TYPE_CHECKING:
    from lowrank_train.nn.reparam import ReparamLinear

PARTS = ("lora_A", "lora_B", "lora_E")  # Q (rank, in), P (out, rank) and lambda (rank, 1) of the paper


class AdaLoRAPart(nn.Module):
    """What AdaLoRA adds to a layer W0 + s P diag(lambda) Q / rank (Zhang et al., arXiv 2303.10512).

    Importance of each entry w of P, lambda, Q after an update, with its gradient g: I = |w g|, smoothed
    I' <- b1 I' + (1 - b1) I, uncertainty U' <- b2 U' + (1 - b2) |I - I'|, score S = I' U'. A triplet's score is its
    lambda's plus the means over its row of Q and its column of P. The gradient of
    orth_reg_weight * mean(|P^T P - I|_F, |Q Q^T - I|_F) is added once an update, whatever the number of micro-batches.
    """

    adapted: nn.Module

    def begin_(self, share: float) -> None:
        """Make the buffers; `share` is the weight of this layer's part in the regulariser."""
        self.share = share
        self._gradients: dict[str, Tensor] = {}
        for part in PARTS:
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{part}_{kind}", torch.zeros_like(self.part(part).detach()))
        self.kept: Tensor
        self.register_buffer("kept", torch.ones_like(self.part("lora_E"), dtype=torch.bool))
        self.mask_due = False  # between the allocation and the masking of one update

    def part(self, name: str) -> nn.Parameter:
        """P, Q or lambda."""
        found: nn.Parameter = getattr(self.adapted, name)["default"]
        return found

    def watch(self) -> None:
        """See to it that gradients are noted; a parameter that was put in another's place is watched anew."""
        for name in PARTS:
            param = self.part(name)
            if param.requires_grad and not hasattr(param, "is_watched"):
                param.is_watched = True  # type: ignore[attr-defined]
                param.register_hook(lambda grad, name=name: self._note(name, grad))

    @torch.no_grad()
    def _note(self, name: str, grad: Tensor) -> Tensor:
        first = name not in self._gradients
        if first and name != "lora_E" and self.share:
            grad = grad + self.share * orthogonality_gradient(self.part(name), tall=name == "lora_B").to(grad.dtype)
        self._gradients[name] = grad.clone() if first else self._gradients[name] + grad
        return grad

    @torch.no_grad()
    def smooth_(self, beta1: float, beta2: float) -> None:
        """Take the gradients of the update into the importances."""
        for name in PARTS:
            grad = self._gradients.get(name)
            if grad is None:
                continue
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(grad)
                grad = grad / torch.distributed.get_world_size()
            importance, uncertainty = self.smoothed(name)
            now = (self.part(name) * grad).abs()
            importance.mul_(beta1).add_((1 - beta1) * now)
            uncertainty.mul_(beta2).add_((1 - beta2) * (now - importance).abs())

    def forget(self) -> None:
        """The gradients of the update that is over."""
        self._gradients = {}

    def smoothed(self, name: str) -> tuple[Tensor, Tensor]:
        """I' and U' of one part."""
        return getattr(self, f"{name}_importance"), getattr(self, f"{name}_uncertainty")

    def scores(self) -> Tensor:
        """Of each triplet: (rank, 1)."""
        first, second, values = (importance * uncertainty for importance, uncertainty in map(self.smoothed, PARTS))
        return values + (first.mean(1) + second.mean(0))[:, None]

    @torch.no_grad()
    def mask_(self) -> None:
        """Make lambda zero where a triplet is not kept, if that is due."""
        if self.mask_due:
            self.part("lora_E").masked_fill_(~self.kept, 0.0)
            self.mask_due = False


def orthogonality_gradient(factor: Tensor, *, tall: bool) -> Tensor:
    """d |C - I|_F / d factor, C = factor^T factor for a tall one and factor factor^T for a wide one; as `factor`."""
    wide = factor.detach().to(torch.promote_types(factor.dtype, torch.float32))
    rows = wide.T if tall else wide
    rest = rows @ rows.T - torch.eye(len(rows), dtype=wide.dtype, device=wide.device)
    slope = 2 * (rest / torch.linalg.matrix_norm(rest).clamp_min(torch.finfo(wide.dtype).tiny)) @ rows
    return slope.T if tall else slope


def adalora_events(config: Any) -> list[Event]:
    """After each update: every layer's importances, then which triplets of all layers are kept, then lambda."""
    last = config.total_step - config.tfinal

    def smooth(layer: AdaLoRAPart, number: int) -> None:
        if number < last:
            layer.smooth_(config.beta1, config.beta2)
        layer.forget()

    def of_each(act: Callable[[AdaLoRAPart, int], None]) -> Action:
        def run(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
            for layer in _ours(layers):
                act(layer, number)

        return run

    return [
        Event("importance", of_each(smooth), 1, 1, quiet=True, of_trained=True),
        Event("rank allocation", allocation(config), 1, 1, quiet=True, together=True),
        Event("masking", of_each(lambda layer, number: layer.mask_()), 1, 1, quiet=True, of_trained=True),
    ]


def allocation(config: Any) -> Action:
    """Which triplets are kept, by PEFT's schedule: the budget of triplets falls as a cube from init_r to target_r a
    layer between updates tinit and total_step - tfinal; every deltaT updates the least of all layers are masked."""
    last = config.total_step - config.tfinal

    @torch.no_grad()
    def act(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
        ours = _ours(layers)
        total = sum(layer.kept.numel() for layer in ours)
        if number > last:
            for layer in ours:
                layer.mask_due = True
        elif number == last or (number > config.tinit and number % config.deltaT == 0):
            left = 1 - (number - config.tinit) / (last - config.tinit)
            target = config.target_r * len(ours)
            masked = total - int((total - target) * left**3 + target)
            if masked > 0:
                scores = [layer.scores() for layer in ours]
                threshold = torch.cat([score.flatten() for score in scores]).kthvalue(masked).values
                for layer, score in zip(ours, scores, strict=True):
                    layer.kept.copy_(score > threshold)
                    layer.mask_due = True

    return act


def _ours(layers: Mapping[str, ReparamLinear]) -> list[AdaLoRAPart]:
    return [layer for layer in layers.values() if isinstance(layer, AdaLoRAPart)]
