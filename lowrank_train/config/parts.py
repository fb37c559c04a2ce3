"""The arguments that a part takes, read off its source without importing it (and so without importing torch).

A part is a dataclass named by `_target_`. Its annotated fields, those of its dataclass bases included, are its
arguments; a Literal says which values there are. A part that stands for a class of some library takes keys that only
that class knows: they go into the field that its class variable `free_keys` names, and it checks them when it is built.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import Part
from lowrank_train.config.suggest import nearest
from lowrank_train.config.values import WrongValue, convert, describe

TARGET = "_target_"
SIMPLE_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "Any": Any, "None": None}


@dataclass(frozen=True)
class Argument:
    """One argument of a part: the type of its values, and whether it has to be given."""

    type: Any
    required: bool


AXES = {
    "weights": "lowrank_train.nn.reparam.Weights",
    "merge": "lowrank_train.nn.merge.Merge",
    "subspace": "lowrank_train.optim.subspace.base.Subspace",
    "inner": "lowrank_train.optim.transform.Transform",
    "lift": "lowrank_train.optim.lift.Lift",
    "storage": "lowrank_train.optim.stored.Storage",
    "refresh": "lowrank_train.optim.subspace.lazy.Lazy",
    "feedback": "lowrank_train.optim.feedback.ErrorFeedback",
    "blocks": "lowrank_train.optim.blocks.BlockSchedule",
    "rest": "lowrank_train.optim.transform.Transform",
    "repeat": "lowrank_train.optim.fast_forward.FastForward",
}
"""What a part of each axis is derived from. Nothing else is ever called: a configuration cannot run other code."""


class NoSuchPart(LookupError):
    """The `_target_` names no class; the message says what is missing."""


@functools.cache
def arguments_of(target: str) -> dict[str, Argument]:
    """Name -> Argument of the dataclass at a dotted path; raises NoSuchPart."""
    module, _, name = target.rpartition(".")
    tree = module_tree(module)
    if tree is None:
        raise NoSuchPart(f"there is no module {module or target}")
    node = _class(tree, name)
    if node is None:
        classes = [item.name for item in tree.body if isinstance(item, ast.ClassDef)]
        close = nearest(name, classes)
        raise NoSuchPart(f"{module} has no class {name}" + (f". Did you mean {module}.{close}?" if close else ""))
    found: dict[str, Argument] = {}
    for base in node.bases:
        origin = _origin(module, tree, base)
        if origin is not None:
            found |= arguments_of(".".join(origin))
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        found |= dict(_fields(module, tree, node))
    return found


@functools.cache
def free_keys_of(target: str) -> str | None:
    """The field that takes what no other field of the class is called; None where there is none."""
    module, _, name = target.rpartition(".")
    tree = module_tree(module)
    node = _class(tree, name) if tree else None
    for item in node.body if node else ():
        if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == "free_keys":
            assert isinstance(item.value, ast.Constant), f"{target}.free_keys has to be the name of a field"
            return str(item.value.value)
    return None


@functools.cache
def ancestors_of(target: str) -> frozenset[str]:
    """The dotted paths of a class and of all its bases that can be read."""
    module, _, name = target.rpartition(".")
    tree = module_tree(module)
    node = _class(tree, name) if tree else None
    if tree is None or node is None:
        return frozenset()
    origins = [_origin(module, tree, base) for base in node.bases]
    return frozenset({target}).union(*(ancestors_of(".".join(origin)) for origin in origins if origin))


def _fields(module: str, tree: ast.Module, node: ast.ClassDef) -> Iterator[tuple[str, Argument]]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        called = item.value if isinstance(item.value, ast.Call) else None
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in called.keywords} if called else {}
        if "ClassVar" in ast.unparse(item.annotation) or settings.get("init") == "False":
            continue
        has_default = item.value is not None and (
            called is None or bool({"default", "default_factory"} & set(settings))
        )
        yield item.target.id, Argument(_type(module, tree, item.annotation), required=not has_default)


def _type(module: str, tree: ast.Module, node: ast.expr) -> Any:
    """The annotation as an object that `convert` understands; what cannot be read accepts anything."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp):
        return _type(module, tree, node.left) | _type(module, tree, node.right)
    if isinstance(node, ast.Subscript):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        inner = tuple(_type(module, tree, item) for item in items)
        name = ast.unparse(node.value).rpartition(".")[2]
        generic: Any = {"Literal": Literal, "tuple": tuple, "list": list, "dict": dict}[name]
        return generic[inner]
    name = ast.unparse(node)
    if name in SIMPLE_TYPES:
        return SIMPLE_TYPES[name]
    for item in tree.body:  # an alias of this module: Side = Literal[...]
        if isinstance(item, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in item.targets):
            return _type(module, tree, item.value)
    origin = _origin(module, tree, node)
    other = module_tree(origin[0]) if origin and origin[0] != module else None
    return Any if origin is None or other is None else _type(origin[0], other, ast.Name(origin[1]))


def _origin(module: str, tree: ast.Module, node: ast.expr) -> tuple[str, str] | None:
    """Module and name that an expression stands for, where this module defines or imports it by name from ours."""
    name = ast.unparse(node)
    if _class(tree, name) is not None:
        return module, name
    for item in tree.body:
        if isinstance(item, ast.ImportFrom) and item.module and item.module.startswith(module.partition(".")[0]):
            for alias in item.names:
                if name == (alias.asname or alias.name):
                    return item.module, alias.name
    return None


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == name), None)


@functools.cache
def module_tree(module: str) -> ast.Module | None:
    """The parsed source of a module; only the top package is looked up, so that no package on the way is run."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest) if rest else Path(spec.origin)
    candidates = [path.with_suffix(".py"), path / "__init__.py"]
    source = next((candidate for candidate in candidates if candidate.is_file()), None)
    return None if source is None else ast.parse(source.read_text(encoding="utf-8"))


def part_faults(key: str, part: Part) -> Iterator[tuple[str, str]]:
    """(dotted key, what is wrong) for every fault of a part; values are put into their types in place."""
    if TARGET not in part:
        group, left = key.replace(".", "/"), " and ".join(part)
        yield key, f"{left} set, but no {group} chosen; drop what is left over with ~{key}, or choose {group}=NAME"
        return
    axis, target = key.rpartition(".")[2], str(part[TARGET])
    try:
        arguments = arguments_of(target)
        if AXES.get(axis, target) not in ancestors_of(target):
            raise NoSuchPart(f"is not derived from {AXES[axis]}, as every choice of strategy/{axis} is")
    except NoSuchPart as error:
        yield f"{key}.{TARGET}", str(error)
        return
    for name, value in part.items():
        if name == TARGET:
            continue
        if name not in arguments:
            if free_keys_of(target) is None:
                yield f"{key}.{name}", ""
            continue
        try:
            part[name] = convert(value, arguments[name].type)
        except WrongValue as error:
            yield f"{key}.{name}", str(error)
    for name, argument in arguments.items():
        if argument.required and name not in part:
            yield f"{key}.{name}", f"is required: {describe(argument.type)}"


def instantiate(part: Part, **runtime: Any) -> Any:
    """The object that a part describes; `runtime` holds what is only known at run time. Raises UserError.

    Call it with parts of a validated configuration only: it imports and calls what `_target_` names.
    """
    part = dict(part)
    faults = [f"{key}: {rule or 'there is no such key'}." for key, rule in part_faults("part", part)]
    if faults:
        raise UserError(faults)
    target = part.pop(TARGET)
    module, _, name = target.rpartition(".")
    collecting = free_keys_of(target)
    if collecting is not None:
        free = {key: part.pop(key) for key in part.keys() - arguments_of(target).keys()}
        part[collecting] = {**part.get(collecting, {}), **free}
    return getattr(importlib.import_module(module), name)(**part, **runtime)
