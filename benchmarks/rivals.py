"""The published optimizers that install from the package registry, each built for the same parameters as ours.

.venv/bin/pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3 fira==1.0.2 tensorly bitsandbytes
.venv/bin/pip install --no-deps ista-daslab-optimizers==1.1.15 gpustat blessed wcwidth nvidia-ml-py
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Params = dict[str, nn.Parameter]
Build = Callable[[Params, Params, int, int], torch.optim.Optimizer]
"""(projected, the rest, rank, updates between two moves of the basis) -> the optimizer."""

LR = 1e-4


def groups(projected: Params, rest: Params, **options: Any) -> list[dict[str, Any]]:
    """The parameter groups of the GaLore family: the options mark the group that is projected."""
    marked = [{"params": list(projected.values()), **options}]
    return [{"params": list(rest.values())}, *marked] if rest else marked


def adamw(projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*projected.values(), *rest.values()], lr=LR, weight_decay=0.0)


def galore(projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    options = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(groups(projected, rest, **options), lr=LR, no_deprecation_warning=True)


def galore_adafactor(projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdafactor

    options = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": "std"}
    settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return GaLoreAdafactor(groups(projected, rest, **options), lr=LR, **settings)


def fira(projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    from fira import FiraAdamW

    options = {"rank": rank, "update_proj_gap": every, "alpha": 0.25, "proj_type": "std"}
    return FiraAdamW(groups(projected, rest, **options), lr=LR, no_deprecation_warning=True)


def apollo(projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    options = {"rank": rank, "update_proj_gap": every, "scale": 1.0, "proj_type": "std"}
    kind = {"proj": "random", "scale_type": "channel"}
    return APOLLOAdamW(groups(projected, rest, **options, **kind), lr=LR, no_deprecation_warning=True)


def apollo_mini(projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    options = {"rank": 1, "update_proj_gap": every, "scale": 128.0, "proj_type": "std"}
    kind = {"proj": "random", "scale_type": "tensor"}
    return APOLLOAdamW(groups(projected, rest, **options, **kind), lr=LR, no_deprecation_warning=True)


def dct_adamw(projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    package = "ista_daslab_optimizers"
    if package not in sys.modules:  # its top imports CUDA extensions, which its DCT-AdamW does without
        spec = importlib.machinery.PathFinder.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every parameter
        from ista_daslab_optimizers.fft_low_rank.dct_adamw import DCTAdamW

        params = [*projected.values(), *rest.values()]
        return DCTAdamW(params, lr=LR, weight_decay=0.0, rank=rank, proj="dct", update_proj_gap=every)


RIVALS: dict[str, tuple[str, Build]] = {
    "adamw": ("torch.optim.AdamW", adamw),
    "galore": ("galore-torch 1.0", galore),
    "galore_adafactor": ("galore-torch 1.0", galore_adafactor),
    "fira": ("fira 1.0.2", fira),
    "apollo": ("apollo-torch 1.0.3", apollo),
    "apollo_mini": ("apollo-torch 1.0.3", apollo_mini),
    "dct_adamw": ("ista-daslab-optimizers 1.1.15", dct_adamw),
}
"""Method -> the published package, and how it is built; the other methods have none in the registry."""
