"""Recorded runs of published code, replayed through the library entry point."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.published import optimizer

Array = NDArray[Any]
Source = Callable[[str, int, Tensor], Any]
BASES = ("basis", "factor", "indices", "proj_after")  # what a recording may call what was in force from an update on


@dataclass
class Scenario:
    """One recorded run: its settings, its arrays, and the recipe that rebuilds weights and gradients."""

    name: str
    settings: dict[str, Any]
    arrays: dict[str, Array]
    recipe: ModuleType

    @classmethod
    def load(cls, folder: Path, name: str) -> Scenario:
        spec = importlib.util.spec_from_file_location("recipe", folder / "recipe.py")
        assert spec is not None and spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        with np.load(folder / f"{name}.npz") as arrays:
            return cls(name, json.loads((folder / f"{name}.json").read_text()), dict(arrays), recipe)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the published code, flat."""
        hyper = dict(self.settings["hyper"])
        return hyper | hyper.pop("group", {})

    def recorded_basis(self, name: str, update: int, grad: Tensor) -> Any:
        """What was in force from a 1-based update on, if that was recorded there: an array, or a pair of them."""
        del grad
        if f"basis_next:{name}@1" in self.arrays:  # recorded after each update; the first basis serves two of them
            return self.arrays[f"basis_next:{name}@1"] if update == 1 else None
        for kind in BASES:
            if f"{kind}:{name}@{update}" in self.arrays:
                return self.arrays[f"{kind}:{name}@{update}"]
            if f"{kind}:{name}:0@{update}" in self.arrays:
                return tuple(self.arrays[f"{kind}:{name}:{part}@{update}"] for part in (0, 1))
        return None

    def own_basis(self, name: str, update: int, grad: Tensor) -> Any:
        """Our singular vectors of the gradient, in float64, each with the sign of the one recorded."""
        recorded = self.recorded_basis(name, update, grad)
        if recorded is None:
            return None
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        parts = recorded if isinstance(recorded, tuple) else (recorded,)
        aligned: list[Tensor] = []
        for part in (torch.from_numpy(part).double() for part in parts):
            transposed = part.shape[1] == grad.shape[1] and not (part.shape[0] == grad.shape[0] and len(aligned) == 0)
            own = right[: part.shape[0]] if transposed else left[:, : part.shape[1]]
            dim = 1 if transposed else 0
            aligned.append(own * (own * part).sum(dim, keepdim=True).sign())
        return tuple(aligned) if isinstance(recorded, tuple) else aligned[0]


@dataclass
class Replay:
    """What came out of one replay."""

    error: float  # of the final weights: ||W - W_ref||_F / ||W_ref - W_0||_F over all tensors
    trace_error: float  # the largest at any update, of a tensor's norm and of the norm of its change, likewise relative
    optimizer: TransformOptimizer
    weights: dict[str, nn.Parameter] = field(default_factory=dict)

    def state(self, name: str) -> dict[str, Any]:
        return self.optimizer.state[self.weights[name]]


def replay(scenario: Scenario, method: str, source: Source | None) -> Replay:
    """Run the scenario with published=True, and compare the weights."""
    settings, final = scenario.settings, scenario.settings["lr"]["T"]
    initial, gradient = scenario.recipe.build(settings["inputs"])
    dtype = np.dtype(settings["dtype"])
    initial = {name: value.astype(dtype) for name, value in initial.items()}
    weights = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in initial.items()}
    optim = optimizer(
        method,
        list(weights.items()),
        lr=settings["lr"]["lr"],
        project=settings["low_rank_tensors"],
        published=True,
        basis_source=source,
        **scenario.options,
    )
    recorded = {name: scenario.arrays[f"{name}@{final}"] for name in weights}
    displacement = sum(float(((recorded[name] - initial[name]) ** 2).sum()) for name in weights) ** 0.5
    trace_error = 0.0
    for update, lr in enumerate(scenario.recipe.lrs(settings["lr"]), start=1):
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, value in gradient(update, {n: w.detach().numpy() for n, w in weights.items()}).items():
            weights[name].grad = torch.from_numpy(np.array(value, dtype=dtype))
        for group in optim.param_groups:
            group["lr"] = lr
        optim.step()
        for name, weight in weights.items():
            norm, _, _, change = scenario.arrays[f"trace:{name}"][update - 1]
            ours = (weight.detach().norm().item(), (weight.detach() - before[name]).norm().item())
            trace_error = max(
                trace_error, *(abs(a - b) / displacement for a, b in zip(ours, (norm, change), strict=True))
            )
    error = sum(float(((recorded[n] - w.detach().numpy()) ** 2).sum()) for n, w in weights.items()) ** 0.5
    return Replay(error / displacement, trace_error, optim, weights)
