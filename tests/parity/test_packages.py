"""Options that no recording has, against the published packages themselves where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.published import optimizer

SHAPES = {"tall": (13, 7, torch.float64), "wide": (6, 17, torch.float64), "square": (9, 9, torch.float32)}
GALORE: list[dict[str, Any]] = [
    {},
    {"proj_type": "reverse_std", "betas": (0.5, 0.9), "weight_decay": 0.3},
    {"proj_type": "left", "correct_bias": False},
    {"proj_type": "right", "update_proj_gap": 1},
    {"proj_type": "full", "eps": 1e-4},
    {"rank": 1, "scale": 2.0},
]
FULL_RANK: dict[str, Any] = {"rank": 40}
ADAFACTOR: list[dict[str, Any]] = [
    {"proj_type": "reverse_std", "beta1": 0.8, "scale_parameter": True, "weight_decay": 0.2},
    {"proj_type": "full", "decay_rate": -0.5, "clip_threshold": 0.7},
    {"eps": (1e-12, 1e-2), "scale_parameter": True},
    {"beta1": 0.0},
]
FIRA: list[dict[str, Any]] = [
    {"alpha": 1.0, "proj_type": "reverse_std"},
    {"alpha": 0.0625, "correct_bias": False, "betas": (0.0, 0.99)},
    {"proj_type": "left", "weight_decay": 0.1},
    {"proj_type": "right"},
]
APOLLO: list[dict[str, Any]] = [
    {"proj": "svd", "scale_type": "tensor", "scale": 3.0},
    {"proj": "random", "scale_front": True, "scale": 0.5, "weight_decay": 0.1},
    {"proj": "random", "scale_type": "tensor", "rank": 1, "disable_nl": True, "proj_type": "reverse_std"},
    {"proj": "random", "rank": 40},
    {"proj": "svd", "correct_bias": False, "betas": (0.8, 0.9)},
]
DCT: list[dict[str, Any]] = [
    {},
    {"sim_type": "makhoul", "rotate_subspace": True},
    {"ell_norm": 2, "update_proj_gap": 3, "use_ef": True},
    {"ell_norm": -1, "rotate_subspace": True, "use_ef": True},
    {"weight_decay": 0.2, "betas": (0.5, 0.9), "eps": 1e-3},
]
GALORE_DEFAULTS: dict[str, Any] = {"rank": 3, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
FIRA_DEFAULTS: dict[str, Any] = {"rank": 3, "update_proj_gap": 4, "alpha": 0.25, "proj_type": "std"}
APOLLO_DEFAULTS: dict[str, Any] = GALORE_DEFAULTS | {"proj": "random", "scale_type": "channel"}
PACKAGES: list[
    tuple[str, str, str, dict[str, Any], list[dict[str, Any]]]
] = [  # method, module, class, options of the projected group with defaults, what varies
    ("galore", "galore_torch", "GaLoreAdamW", GALORE_DEFAULTS, [*GALORE, FULL_RANK]),
    ("galore_adafactor", "galore_torch", "GaLoreAdafactor", GALORE_DEFAULTS, ADAFACTOR),
    ("fira", "fira", "FiraAdamW", FIRA_DEFAULTS, FIRA),
    ("apollo", "apollo_torch", "APOLLOAdamW", APOLLO_DEFAULTS, APOLLO),
]
CASES = [
    pytest.param(
        method, module, cls, defaults, options, id=f"{method}-{'-'.join(map(str, options.values())) or 'defaults'}"
    )
    for method, module, cls, defaults, varied in PACKAGES
    for options in varied
]


def gradients(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Nine updates: of a matrix, and of a vector beside it."""
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    for update in range(9):
        scale = 3.0 if update == 5 else 1.0  # a jump that limiters and clipping act on
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        yield matrix.to(dtype), torch.randn(shape[1], generator=generator, dtype=torch.float64).to(dtype)


def weights(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        "mlp.up.weight": nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)),
        "bias": nn.Parameter(torch.randn(shape[1], generator=generator, dtype=torch.float64).to(dtype)),
    }


@pytest.mark.parametrize(("rows", "columns", "dtype"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("method", "module", "cls", "defaults", "options"), CASES)
def test_same_weights_as_the_package(
    method: str,
    module: str,
    cls: str,
    defaults: dict[str, Any],
    options: dict[str, Any],
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> None:
    """With the package's own bases, at every update."""
    package = pytest.importorskip(module)
    theirs, ours = weights((rows, columns), dtype), weights((rows, columns), dtype)
    own: dict[str, Any] = {key: value for key, value in options.items() if key not in defaults}
    if method == "galore_adafactor":
        own |= {"relative_step": False} | ({} if "scale_parameter" in own else {"scale_parameter": False})
    projected = {
        "params": [theirs["mlp.up.weight"]],
        **{key: options.get(key, default) for key, default in defaults.items()},
    }
    published = getattr(package, cls)([projected, {"params": [theirs["bias"]]}], lr=0.01, **own)

    def basis(name: str, update: int, grad: Tensor) -> Any:
        found = published.state[theirs[name]]["projector"].ortho_matrix
        return tuple(found) if isinstance(found, list) else found

    every_option: dict[str, Any] = defaults | options | own
    replayed = optimizer(method, list(ours.items()), lr=0.01, published=True, basis_source=basis, **every_option)
    agree(published, replayed, theirs, ours, (rows, columns), dtype)


def dct_package() -> ModuleType:
    """The one module, around the package's own __init__, which cannot do without its CUDA extension."""
    if "ista_daslab_optimizers" not in sys.modules:
        found = importlib.util.find_spec("ista_daslab_optimizers")
        if found is None:
            pytest.skip("ista-daslab-optimizers is not installed")
        stand_in = ModuleType("ista_daslab_optimizers")
        stand_in.__path__ = list(found.submodule_search_locations or [])
        sys.modules["ista_daslab_optimizers"] = stand_in
    return importlib.import_module("ista_daslab_optimizers.fft_low_rank.dct_adamw")


@pytest.mark.parametrize(("rows", "columns", "dtype"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", DCT, ids=["-".join(map(str, options.values())) or "defaults" for options in DCT])
def test_same_weights_as_dct_adamw(
    options: dict[str, Any], rows: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing supplied: the choice of columns is ours."""
    package = dct_package()
    # theirs writes a product into one of its factors, which is undefined, and wrong for shapes as small as these
    monkeypatch.setattr(
        package.FFTLowRankProjector,
        "rotate_subspace",
        lambda self, r, w: w.copy_(w @ r if self.is_right_proj else r @ w),
    )
    theirs, ours = weights((rows, columns), dtype), weights((rows, columns), dtype)
    arguments: dict[str, Any] = {"weight_decay": 0.0, "rank": 3, "proj": "dct"} | options
    published = package.DCTAdamW(list(theirs.values()), lr=0.01, **arguments)
    replayed = optimizer("dct_adamw", list(ours.items()), lr=0.01, published=True, **arguments)
    # with makhoul, theirs takes what it projects from a fast transform with factors rounded to float32
    agree(published, replayed, theirs, ours, (rows, columns), dtype, float32="sim_type" in options)


def agree(
    published: torch.optim.Optimizer,
    replayed: torch.optim.Optimizer,
    theirs: dict[str, nn.Parameter],
    ours: dict[str, nn.Parameter],
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    float32: bool = False,
) -> None:
    tolerance = 2e-5 if float32 or dtype == torch.float32 else 1e-11
    for update, grads in enumerate(gradients(shape, dtype), start=1):
        for mine, other, grad in zip(ours.values(), theirs.values(), grads, strict=True):
            mine.grad, other.grad = grad.clone(), grad.clone()
        for group in published.param_groups + replayed.param_groups:
            group["lr"] = 0.01 * update
        published.step()
        replayed.step()
        for name in ours:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=f"{name} at {update}"
            )
