"""Reading the recorded runs of published code, and replaying one with our optimizer."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.optimizer import Group, TransformOptimizer
from lowrank_train.optim.subspace.dense import align_signs
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Slot, State, counter, tensor_of


@dataclass
class Scenario:
    """One recorded run: its settings, its arrays, and the recipe that rebuilds weights and gradients."""

    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    recipe: ModuleType

    @classmethod
    def load(cls, folder: Path, name: str) -> Scenario:
        spec = importlib.util.spec_from_file_location("recipe", folder / "recipe.py")
        assert spec is not None and spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        with np.load(folder / f"{name}.npz") as arrays:
            return cls(json.loads((folder / f"{name}.json").read_text()), dict(arrays), recipe)

    def bases(self, name: str, update: int) -> dict[str, Tensor] | None:
        """The bases recorded for a matrix from a 1-based update on, as (dimension, rank), by our state key."""
        found = {}
        for key, array in self.arrays.items():
            part, _, recorded_update = key.partition("@")
            if not part.startswith("basis:") or int(recorded_update or 0) != update:
                continue
            _, recorded_name, *which = part.split(":")
            if recorded_name != name:
                continue
            rank = self.settings["hyper"]["group"]["rank"]
            left = which == ["0"] or (not which and array.shape[1] == rank and not self._right(name))
            found["basis_left" if left else "basis_right"] = torch.from_numpy(array if left else array.T)
        return found or None

    def _right(self, name: str) -> bool:
        rows, columns = self.arrays[f"{name}@1"].shape
        reverse = self.settings["hyper"]["group"]["proj_type"] == "reverse_std"
        return (rows >= columns) != reverse


@dataclass
class ReplayedSvd(Svd):
    """Either the recorded basis itself, or our own decomposition with the signs that were recorded."""

    scenario: Scenario | None = None
    name: str = ""
    inject: bool = True

    def refresh(self, grad: Tensor, state: State) -> bool:
        assert self.scenario is not None
        recorded = self.scenario.bases(self.name, counter(state, "updates_done") + 1)
        assert recorded is not None, "we move the basis at an update where the published code did not"
        own = self.find(grad, state)
        for key, basis in recorded.items():
            tensor_of(state, key).copy_(basis if self.inject else align_signs(own[key], basis))
        return True


def replay(scenario: Scenario, *, inject: bool) -> dict[str, Any]:
    """Run the scenario; returns the largest relative error of any saved weight, and the final optimizer states.

    Relative to the total displacement, over all tensors: ||W - W_ref||_F / ||W_ref,T - W_0||_F.
    """
    hyper, final_update = scenario.settings["hyper"], scenario.settings["lr"]["T"]
    initial, gradient = scenario.recipe.build(scenario.settings["inputs"])
    weights = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in initial.items()}
    adam = Adam(betas=tuple(hyper["betas"]), eps=hyper["eps"], eps_inside=False, weight_decay_first=False)
    groups = []
    for name, weight in weights.items():
        rule: Adam | InSubspace = adam
        if name in scenario.settings["low_rank_tensors"]:
            group = hyper["group"]
            basis = ReplayedSvd(
                rank=group["rank"],
                every=group["update_proj_gap"],
                side=group["proj_type"],
                scenario=scenario,
                name=name,
                inject=inject,
            )
            rule = InSubspace(basis, adam, Backproject(group["scale"]))
        groups.append(Group(name, rule, [(name, weight)], [Slot(name, 0, 0.0, weight.dtype)]))
    optimizer = TransformOptimizer(groups, lr=1.0, weight_decay=hyper["weight_decay"])
    displacement = sum(((scenario.arrays[f"{n}@{final_update}"] - initial[n]) ** 2).sum() for n in weights) ** 0.5
    worst = 0.0
    for update, lr in enumerate(scenario.recipe.lrs(scenario.settings["lr"]), start=1):
        for name, value in gradient(update, {n: w.detach().numpy() for n, w in weights.items()}).items():
            weights[name].grad = torch.from_numpy(np.ascontiguousarray(value))
        for entry in optimizer.param_groups:
            entry["lr"] = lr
        optimizer.step()
        if update in scenario.settings["weights_saved_at_steps"]:
            error = sum(
                ((scenario.arrays[f"{n}@{update}"].astype(np.float64) - w.detach().numpy()) ** 2).sum()
                for n, w in weights.items()
            )
            rounding = 0.0 if update == final_update else 1e-6  # earlier weights were stored rounded to float32
            worst = max(worst, error**0.5 / displacement - rounding)
    return {"error": worst, "states": {name: optimizer.state[weight] for name, weight in weights.items()}}
