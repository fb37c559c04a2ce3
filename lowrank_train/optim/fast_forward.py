"""Fast Forward: the last update is made again and again while a few held-out rows get easier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


class Previous:
    """What the parameters of an optimizer were before the last update, where somebody wants to know.

    Taken anew before every update, so that a checkpoint does without.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.kept: dict[Tensor, Tensor] = {}  # parameter -> copy; those of the last update alone

    def note(self, params: Iterable[Tensor]) -> None:
        """An update of these is about to be made."""
        if self.wanted:
            self.kept = {param: self._copy(param) for param in params}

    def _copy(self, param: Tensor) -> Tensor:
        kept = self.kept.get(param)
        return param.detach().clone() if kept is None or kept.shape != param.shape else kept.copy_(param.detach())


@dataclass
class FastForward:
    """W <- W + k D after every `every` updates, D the update just made (Rahamim et al., arXiv 2409.04206).

    k is counted up from 0 while the mean loss on `rows` held-out rows falls: a line search along the last update of all
    that is trained. The rule's state stays what it is.
    """

    every: int = 6  # updates: the paper's T_interval
    rows: int = 32  # of the validation data, the first ones
    most: int = 100  # repetitions; each is a forward pass over these rows

    def __post_init__(self) -> None:
        for name in ("every", "rows", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.repeat.{name} is {getattr(self, name)}; it must be at least 1")

    @torch.no_grad()
    def after(self, step: int, optimizer: torch.optim.Optimizer, held_out_loss: Callable[[], float] | None) -> int:
        """Repeat update number `step`, counted from 1, if its turn has come; k."""
        if step % self.every:
            return 0
        previous = getattr(optimizer, "previous", None)
        if held_out_loss is None or not isinstance(previous, Previous):
            raise ValueError("strategy.repeat goes with strategy.optimizer(...) and run_events(..., held_out_loss=...)")
        ends = {param: param.detach().clone() for param in previous.kept}
        lines = {param: torch.sub(end, previous.kept[param]) for param, end in ends.items()}

        def go_to_(count: int) -> None:
            for param, end in ends.items():
                wide = torch.promote_types(param.dtype, torch.float32)
                param.copy_(torch.add(end.to(wide), lines[param].to(wide), alpha=count) if count else end)

        best, count = held_out_loss(), 0
        while count < self.most:
            go_to_(count + 1)
            loss = held_out_loss()
            if not loss < best:  # a loss that is not a number ends it too
                go_to_(count)
                break
            best, count = loss, count + 1
        return count
