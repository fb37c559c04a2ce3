"""Names and options of the optimizer classes of torch.optim and pytorch-optimizer, read off their sources."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from lowrank_train.config.parts import arguments_of, free_keys_of, module_tree
from lowrank_train.config.schema import Part
from lowrank_train.config.suggest import nearest

PACKAGES = {"torch.optim": "torch.optim", "pytorch_optimizer": "pytorch_optimizer.optimizer"}
"""What may stand before the dot, and the module whose imports are the classes."""


def library_faults(key: str, part: Part) -> Iterator[tuple[str, str]]:
    """(dotted key, what is wrong) for a class that there is not, and options that it has not.

    Only what is sure without importing torch; the part itself checks the rest when it is built.
    """
    target, name = str(part.get("_target_")), part.get("name")
    package, _, wanted = str(name).rpartition(".")
    if free_keys_of(target) is None or name is None or package not in ("", *PACKAGES):
        return
    known: dict[str, tuple[str, str]] = {}
    for prefix in PACKAGES:
        known |= {k: v for k, v in classes_in(prefix).items() if package in ("", prefix) and k not in known}
    found = {own.lower(): own for own in reversed(known)}.get(wanted.lower())  # torch's, where both have one
    if found is None:
        close = nearest(wanted, known)
        more = "" if classes_in("pytorch_optimizer") else "; the package pytorch-optimizer, which has more, is missing"
        yield f"{key}.name", "there is no such optimizer class" + (f". Did you mean {close}?" if close else "") + more
        return
    taken = options_of(*known[found])
    for option in part.keys() - arguments_of(target).keys() - {"_target_"} - set(taken) if taken else ():
        if option != "lr":  # of which the part says where it is
            close = nearest(option, [other for other in taken if other != "lr"])
            hint = f"Did you mean {key}.{close}?" if close else f"It takes: {', '.join(taken)}"
            yield f"{key}.{option}", f"{found} has no option {option}. {hint}"


@functools.cache
def classes_in(package: str) -> dict[str, tuple[str, str]]:
    """Name -> (module, class) of what a package has; nothing where it is not installed."""
    inside = PACKAGES[package]
    body = tree.body if (tree := module_tree(inside)) else []
    imports = [item for item in body if isinstance(item, ast.ImportFrom) and (item.module or "").startswith(inside)]
    pairs = [(item.module or "", alias) for item in imports for alias in item.names if alias.name[0].isupper()]
    return {alias.asname or alias.name: (module, alias.name) for module, alias in pairs if alias.name != "Optimizer"}


@functools.cache
def options_of(module: str, name: str) -> tuple[str, ...]:
    """The arguments of a class behind self and the parameters; none where its source does not say."""
    tree = module_tree(module)
    classes = [item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == name] if tree else []
    makers = [item for cls in classes for item in cls.body if isinstance(item, ast.FunctionDef)]
    arguments = next((item.args for item in makers if item.name == "__init__"), None)
    return () if arguments is None else tuple(a.arg for a in [*arguments.args[2:], *arguments.kwonlyargs])
