"""What is installed: Python, torch, the dependencies and the extras, in the ranges that were tested?"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator

from lowrank_train.config.schema import RunConfig
from lowrank_train.doctor.finding import Finding, first_line

OLDEST_PYTHON = (3, 11)  # requires-python of pyproject.toml
GIVES = {  # extra of pyproject.toml -> what it is for
    "tensorboard": "logger=tensorboard",
    "wandb": "logger=wandb",
    "optimizers": "more classes for strategy/inner=library and strategy/rest=library",
    "peft": "strategy=peft and the methods of PEFT, and export adapter=true",
    "bnb": "only for comparisons; 8-bit state is built in",
    "slurm": "launcher=slurm",
}


def python(_: RunConfig) -> Iterator[Finding]:
    old = sys.version_info[:2] < OLDEST_PYTHON
    fix = f"use {'.'.join(map(str, OLDEST_PYTHON))} or newer" if old else ""
    yield Finding("python", "fault" if old else "ok", f"{platform.python_version()} at {sys.executable}", fix)


def torch_itself(_: RunConfig) -> Iterator[Finding]:
    wanted = requirements().get("torch", "")
    install = f"pip install 'torch{wanted}'"
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # noqa: BLE001  (a broken installation may raise anything)
        yield Finding("torch", "fault", f"cannot be imported: {first_line(error)}", install)
        return
    version = str(torch.__version__)
    if within(version, wanted):
        yield Finding("torch", "ok", f"{version} (tested: {wanted})")
    else:
        yield Finding("torch", "note", f"{version} is outside of what was tested, {wanted}", install)


def packages(config: RunConfig) -> Iterator[Finding]:
    """The base dependencies by their metadata: nothing is imported. torch has a probe of its own that is not quick."""
    wanted = {name: spec for name, spec in requirements().items() if name != "torch" or config.quick}
    if not wanted:
        yield Finding(
            "packages", "note", "lowrank_train is not installed, so that ranges are not known", "pip install ."
        )
        return
    good = 0
    for name, spec in wanted.items():
        version = installed(name)
        if version is None:
            yield Finding("packages", "fault", f"{name} is not installed", f"pip install '{name}{spec}'")
        elif not within(version, spec):
            yield Finding("packages", "note", f"{name} {version} is outside of {spec}", f"pip install '{name}{spec}'")
        else:
            good += 1
    yield Finding("packages", "ok", f"{good} of {len(wanted)} dependencies are in the ranges that were tested")


def extras(_: RunConfig) -> Iterator[Finding]:
    for extra, gives in GIVES.items():
        for name, spec in requirements(extra).items():
            version, install = installed(name), f"pip install '{name}{spec}'"
            if version is None:
                yield Finding(name, "note", f"not installed ({gives})", install)
            elif within(version, spec):
                yield Finding(name, "ok", f"{version} ({gives})")
            else:
                yield Finding(name, "note", f"{version} is outside of {spec} ({gives})", install)


def requirements(extra: str | None = None) -> dict[str, str]:
    """{package: range} of the base dependencies, or of one extra; empty where the project is not installed."""
    try:
        lines = importlib.metadata.requires("lowrank_train") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        named = re.search(r"extra == ['\"](\w+)['\"]", marker)
        name, spec = re.fullmatch(r"([\w.-]+)(.*)", requirement.strip().split("[")[0]).groups()  # type: ignore[union-attr]
        if (named[1] if named else None) == extra:
            found[name] = ",".join(sorted(spec.strip().split(","), reverse=True))  # the lower bound first
    return found


def installed(name: str) -> str | None:
    """The version of a package, None where it is absent; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def within(version: str, spec: str) -> bool:
    """Whether 2.13.0+cpu is in >=2.11,<2.14: numbers alone are compared."""
    number = numbers(version)
    tests = {">=": number.__ge__, "<": number.__lt__, "==": number.__eq__}
    clauses = re.findall(r"(>=|<|==)([\d.]+)", spec)
    return all(tests[sign](numbers(bound)) is True for sign, bound in clauses)


def numbers(version: str) -> tuple[int, ...]:
    """The leading whole numbers of a version."""
    leading = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()
