"""Names and options of the methods of the package PEFT, read off its sources without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from lowrank_train.config.parts import arguments_of, module_tree
from lowrank_train.config.schema import Part
from lowrank_train.config.suggest import nearest

TARGET = "lowrank_train.nn.peft.Peft"
INSTALL = "needs the package PEFT: pip install 'lowrank_train[peft]'"

PROMPTS = "puts trained vectors before the input and changes no matrix, so that there is nothing to fold"
REFUSED = {
    "PROMPT_TUNING": PROMPTS,
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "CPT": PROMPTS,
    "CARTRIDGE": PROMPTS,
    "ADAPTION_PROMPT": PROMPTS,
    "LN_TUNING": "trains norms and no matrix",
    "TRAINABLE_TOKENS": "trains rows of the embedding and no matrix of a linear layer",
    "BEFT": "trains biases and no matrix",
    "LILY": "routes each input to other factors, so that no single matrix stands for a layer",
    "POLY": "mixes adapters by the task of each row, which the data here does not name",
    "XLORA": "mixes adapters that were trained before by each input",
    "SHADOW": "runs a second model beside the base",
    "ADAMSS": "clusters singular vectors with scikit-learn and trains subspaces by a loop of its own",
}
"""Methods of PEFT 0.21 that are no representation of a matrix, with the reason."""

CALIBRATED = {"eva": "strategy=eva", "lora_ga": "strategy=lora_ga", "corda": "", "loftq": ""}
"""Values of init_lora_weights that need a pass over data or a quantised base, and the strategy of ours that does so."""

OURS = {
    "target_modules": "strategy.weights.modules",
    "modules_to_save": "strategy.weights.also_train",
    "base_model_name_or_path": "model.path",
    "revision": "model.revision",
}
"""Options of PEFT that are said by a key here."""
SET_HERE = ("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode")


def peft_faults(key: str, part: Part) -> Iterator[tuple[str, str]]:
    """(dotted key, what is wrong) for a method that PEFT has not, and for options that the method has not."""
    if part.get("_target_") != TARGET:
        return
    known, name = methods(), part.get("type")
    if not known:
        yield f"{key}.type", INSTALL
        return
    if not isinstance(name, str):  # the type of the value is checked with the part's other fields
        return
    method = name.upper()
    fault = method_fault(method, known)
    if fault is not None:
        yield f"{key}.type", fault
        return
    for option in part.keys() - arguments_of(TARGET).keys() - {"_target_"}:
        fault = option_fault(method, option, part[option], options_of(*known[method]))
        if fault is not None:
            yield f"{key}.{option}", fault


def method_fault(method: str, known: object) -> str | None:
    """Why a method, in capitals, cannot be chosen; None if it can."""
    names = list(known) if isinstance(known, dict) else []
    if method in REFUSED:
        return f"cannot be a representation: PEFT's {method} {REFUSED[method]}"
    if method in names:
        return None
    close = nearest(method, names)
    hint = f". Did you mean {close}?" if close else f". There are: {', '.join(sorted(set(names) - set(REFUSED)))}"
    return f"PEFT has no such method{hint}"


def option_fault(method: str, option: str, value: object, taken: tuple[str, ...]) -> str | None:
    """Why a method cannot have this option; None if it can."""
    if option in OURS:
        return f"is said by {OURS[option]} here"
    if option in SET_HERE:
        return "is set from the rest of the configuration"
    if option not in taken:
        others = [name for name in taken if name not in (*OURS, *SET_HERE)]
        close = nearest(option, others)
        return f"PEFT's {method} has no option {option}. " + (
            f"Did you mean strategy.weights.{close}?" if close else f"It takes: {', '.join(others)}"
        )
    if option == "init_lora_weights" and value in CALIBRATED:
        ours = f"{CALIBRATED[value]}, which does so in its first update, or " if CALIBRATED[value] else ""
        return (
            f"needs a pass over data or a quantised base before the first update; use {ours}true, gaussian, "
            "orthogonal, pissa or olora"
        )
    return None


@functools.cache
def methods() -> dict[str, tuple[str, str]]:
    """Name in capitals -> (module, class of its options), as PEFT registers them; nothing where it is not installed."""
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        return {}
    found = {}
    for folder in sorted(Path(spec.origin).parent.joinpath("tuners").iterdir()):
        module = f"peft.tuners.{folder.name}"
        tree = module_tree(module) if folder.is_dir() else None
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)) if tree else ():
            given = {word.arg: word.value for word in call.keywords}
            if ast.unparse(call.func) == "register_peft_method":
                found[str(ast.literal_eval(given["name"])).upper()] = (module, ast.unparse(given["config_cls"]))
    return found


@functools.cache
def options_of(module: str, name: str) -> tuple[str, ...]:
    """The fields of a dataclass and of its bases, wherever they are imported from."""
    place = _defined(module, name)
    if place is None:
        return ()
    inside, node = place
    inherited = [option for base in node.bases for option in options_of(inside, ast.unparse(base))]
    targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
    own = [target.id for target in targets if isinstance(target, ast.Name)]
    return tuple(dict.fromkeys([*own, *inherited]))


def _defined(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The module and the source of a class, followed through imports of it."""
    tree = module_tree(module)
    for item in tree.body if tree else ():
        if isinstance(item, ast.ClassDef) and item.name == name:
            return module, item
        if isinstance(item, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in item.names):
            path = module_path(module, item)
            if path.startswith("peft"):
                return _defined(path, name)
    return None


def module_path(module: str, item: ast.ImportFrom) -> str:
    """The absolute name of the module that an import inside `module` names."""
    if not item.level:
        return item.module or ""
    spec = importlib.util.find_spec("peft")
    assert spec is not None and spec.origin is not None
    is_package = Path(spec.origin).parent.joinpath(*module.split(".")[1:]).is_dir()
    parts = module.split(".") + ([""] if is_package else [])
    return ".".join([*parts[: -item.level], *([item.module] if item.module else [])])
