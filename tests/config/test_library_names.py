"""Optimizer classes by name, refused before anything is built, and without importing torch."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys

import pytest

from lowrank_train.config import UserError, compose
from lowrank_train.config.library_names import PACKAGES, classes_in, options_of

PACKAGED = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="the extra is not installed"
)
BASE = ["strategy=library", "recipe=null", "task=explain"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["strategy.rest.name=AdamX"], "strategy.rest.name=AdamX"),
        (["strategy.rest.name=Rpropp"], "there is no such optimizer class. Did you mean Rprop?"),
        (["strategy.rest.name=torch.optim.NAdan"], "Did you mean NAdam?"),
        (["strategy.rest.name=nadam", "+strategy.rest.bettas=[0.9,0.9]"], "NAdam has no option bettas. Did you mean"),
        (["strategy.rest.name=nadam", "+strategy.rest.zzz=1"], "It takes: lr, betas"),
        (
            [
                "strategy/inner=library",
                "strategy/subspace=svd",
                "strategy/lift=backproject",
                "strategy.inner.name=Lionn",
            ],
            "strategy.inner.name",
        ),
    ],
)
def test_refused_at_once(words: list[str], fault: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([*BASE, *words])
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["name=AdamW", "+strategy.rest.amsgrad=true"],
        ["name=adamw"],
        ["name=torch.optim.SGD", "+strategy.rest.momentum=0.9"],
    ],
)
def test_what_there_is_passes(words: list[str]) -> None:
    compose([*BASE, f"strategy.rest.{words[0]}", *words[1:]])


@PACKAGED
def test_the_package_adds_its_own() -> None:
    compose([*BASE, "strategy.rest.name=adabelief", "+strategy.rest.rectify=true"])
    compose([*BASE, "strategy.rest.name=pytorch_optimizer.RAdam"])
    with pytest.raises(UserError, match="DiffGrad has no option rectifie"):
        compose([*BASE, "strategy.rest.name=DiffGrad", "+strategy.rest.rectifie=true"])


@pytest.mark.parametrize("package", PACKAGES)
def test_the_sources_say_what_the_classes_are(package: str) -> None:
    """No class is missing, so that none is refused that there is, and their options are those of their signatures."""
    pytest.importorskip(package, reason="the extra `optimizers` is not installed")
    from lowrank_train.optim.library_classes import _classes  # imports torch

    real = _classes(sys.modules[package])
    assert set(real) - set(classes_in(package)) <= {"BaseOptimizer"} | set(classes_in("torch.optim"))
    for name, place in classes_in(package).items():
        options = options_of(*place)
        if name in real and options:
            assert list(options) == [
                p.name for p in list(inspect.signature(real[name]).parameters.values())[1:] if p.kind != p.VAR_KEYWORD
            ], name


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys; from lowrank_train.config.library_names import classes_in, library_faults\n"
        "faults = list(library_faults('k', {'_target_': 'lowrank_train.optim.library.Library', 'name': 'AdanW'}))\n"
        "assert faults and 'AdamW' in faults[0][1], faults\n"
        "assert 'torch' not in sys.modules and 'pytorch_optimizer' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
