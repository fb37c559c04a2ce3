"""The shape of the house: which part may import which, read from the source without running it."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lowrank_train"
FLOORS = [
    {"kernels", "config", "data", "checkpoint", "checkpoint_shards"},
    {"optim", "nn", "models", "load_errors"},
    {"strategy", "strategy_checks", "reparametrising", "published", "evaluate", "export", "adapter_files", "parallel"},
    {"memory", "report", "explain", "doctor", "support", "support_table"},
    {"train"},
    {"cli", "verbs"},
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
NEVER = {
    ("optim", "nn"),
    ("nn", "optim"),
    ("kernels", "config"),
    ("kernels", "data"),
    ("config", "data"),
    ("config", "kernels"),
}
ONLY_IN = {
    "lightning": re.compile(r"lowrank_train/(train|data)/"),
    "hydra": re.compile(r"lowrank_train/(cli\.py|config/|train/run\.py)"),
    "wandb": re.compile(r"lowrank_train/train/"),
    "deepspeed": re.compile(r"lowrank_train/train/"),
    "triton": re.compile(r"lowrank_train/kernels/triton/"),
}
LAZY = "lowrank_train.kernels.triton"  # imported inside functions alone, so that it may import what may be missing
PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [
    *PACKAGE_FILES,
    *sorted(file for folder in ("tests", "benchmarks", "data") for file in (ROOT / folder).rglob("*.py")),
    *ROOT.glob("*.py"),
]
MAX_LINES = 400


def relative(file: Path) -> str:
    """The path from the project's root, with forward slashes."""
    return file.relative_to(ROOT).as_posix()


@functools.cache
def imports(file: Path) -> tuple[tuple[str, bool], ...]:
    """Every dotted name that a file imports, also inside functions, and whether that happens at import time."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[tuple[str, bool]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    lazy = {  # inside a function, or behind a condition such as TYPE_CHECKING
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            for alias in node.names:
                yield f"{base}.{alias.name}", node not in lazy


def unit_of(dotted: str) -> str | None:
    """The part of the package that a dotted name belongs to; None for others' packages and for the package itself."""
    parts = dotted.split(".")
    is_ours = parts[0] == "lowrank_train" and len(parts) > 1
    exists = is_ours and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file())
    return parts[1] if exists else None


def unit_edges() -> dict[tuple[str, str], str]:
    """Which part imports which other part, with one file that does."""
    edges: dict[tuple[str, str], str] = {}
    for file in PACKAGE_FILES:
        if (importer := unit_of(".".join(file.relative_to(ROOT).with_suffix("").parts))) == "__init__":
            continue  # the package's own front door may open on everything
        for dotted, _ in imports(file):
            if importer and (imported := unit_of(dotted)) and imported != importer:
                edges.setdefault((importer, imported), relative(file))
    return edges


def test_every_part_stands_on_a_floor() -> None:
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in PACKAGE_FILES} - {"__init__"}
    assert parts <= set(FLOOR_OF), "give each new part a floor"


def test_nothing_imports_from_above() -> None:
    upward = {edge: file for edge, file in unit_edges().items() if FLOOR_OF[edge[0]] < FLOOR_OF[edge[1]]}
    assert not upward


def test_parts_of_one_floor_keep_their_distance() -> None:
    edges = unit_edges()
    assert not {edge: file for edge, file in edges.items() if edge in NEVER}
    assert not [edge for edge in edges if edge[::-1] in edges], "two parts that need each other are one part"


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_in_their_places(library: str) -> None:
    strays = {
        relative(file)
        for file in PACKAGE_FILES
        if any(dotted.split(".")[0] == library for dotted, _ in imports(file))
        and not ONLY_IN[library].match(relative(file))
    }
    assert not strays


def test_configuration_is_light() -> None:
    """A misspelt key is refused in a second or two only as long as reading the configuration imports nothing heavy."""
    heavy = "{'torch', 'transformers', 'lightning', 'datasets', 'matplotlib'}"
    code = f"import sys, lowrank_train.config, lowrank_train.cli; sys.exit(str({heavy} & set(sys.modules) or ''))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert not result.stderr.strip()


@pytest.mark.parametrize("name", ["schema", "errors"])
def test_schema_and_errors_need_no_library_at_all(name: str) -> None:
    libraries = {dotted.split(".")[0] for dotted, _ in imports(PACKAGE / "config" / f"{name}.py")}
    assert libraries <= sys.stdlib_module_names | {"lowrank_train"}


def test_dependencies_are_those_declared() -> None:
    """Imported at import time means a base dependency, imported at all means declared, and declared means imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {library_of(entry) for entry in project["dependencies"]}
    extras = {library_of(entry) for entries in project["optional-dependencies"].values() for entry in entries}
    at_import, anywhere = set(), set()
    for file in [*PACKAGE_FILES, ROOT / "train.py"]:
        for dotted, now in imports(file):
            library = dotted.split(".")[0]
            if library not in sys.stdlib_module_names and library != "lowrank_train":
                anywhere.add(library)
                if now and not relative(file).startswith(LAZY.replace(".", "/")):
                    at_import.add(library)
            assert not (now and dotted.startswith(LAZY) and not relative(file).startswith(LAZY.replace(".", "/"))), file
    assert at_import <= base
    assert anywhere <= base | extras
    assert base <= anywhere


def library_of(requirement: str) -> str:
    """The name under which a package that pyproject.toml names is imported."""
    name = re.split(r"[^\w-]", requirement)[0]
    return {"hydra-core": "hydra", "pyyaml": "yaml", "liger-kernel": "liger_kernel"}.get(name, name)


@pytest.mark.parametrize("file", ALL_FILES, ids=relative)
def test_every_file_says_what_it_is_and_stays_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.name == "__init__.py" and not text:
        return
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "open with a docstring of one sentence"
    assert docstring.split("\n\n")[0].rstrip().endswith((".", "?")), "its first paragraph is a sentence"
    assert len(text.splitlines()) <= MAX_LINES
