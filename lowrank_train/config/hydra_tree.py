"""Hydra's composition of one choice of each group and the recipe, made anew only once a file has changed.

Hydra takes a tenth of a second for a tree, and a table or a grid asks for the same ones again and again.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.errors import UserError
from lowrank_train.config.files import yaml_fault
from lowrank_train.config.paths import RECIPE_GROUP, recipe_files, recipe_name, shown, until_changed, version_of_yaml
from lowrank_train.config.suggest import nearest
from lowrank_train.config.words import Words, no_such_choice

MOST_REPAIRS = 8  # wrong choices inside files that are looked past to find more faults
MOST_KEPT = 1024  # trees; each is some 8 KB

Choices = Mapping[str, str | None]
"""Group -> choice; None: none of them."""


def hydra_tree(words: Words, choices: Choices, *, alone: bool = False) -> tuple[Any, dict[str, str]]:
    """The tree of the chosen groups and all others of conf/config.yaml, and the choice that Hydra took of every group.

    With `alone` the tree is that of the chosen groups only. Faults go into `words`; UserError where nothing can be
    composed.
    """
    import yaml
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    chosen = dict(choices)
    for _ in range(MOST_REPAIRS):
        try:
            pickled, selected = _pickled_tree(version_of_yaml(), tuple(chosen.items()), alone)
            return pickle.loads(pickled), dict(selected)  # noqa: S301 (bytes of our own)
        except UserError as error:
            raise UserError([*words.faults, *error.faults]) from None
        except MissingConfigException as error:
            words.faults.append(_missing_choice(error, words))
            missing = error.missing_cfg_file or ""
            group, _, name = missing.rpartition("/")
            close = nearest(name, error.options or [], limit=len(name))
            if not close or chosen.get(group) == close:
                break
            chosen[group] = close
        except HydraException as error:
            words.faults.append(" ".join(str(error).split()))
            break
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            mark = getattr(error, "problem_mark", None)
            path = shown(Path(mark.name)) if mark else "conf"
            words.faults.append(
                yaml_fault(error, path) if isinstance(error, yaml.YAMLError) else str(error).splitlines()[0]
            )
            break
    raise UserError(words.faults)


@functools.lru_cache(maxsize=MOST_KEPT)
def _pickled_tree(
    version: str, chosen: tuple[tuple[str, str | None], ...], alone: bool
) -> tuple[bytes, Mapping[str, str]]:
    """The tree, unresolved, as bytes from which each caller makes his own; `version`: of the files it is made of."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict

    if not alone:  # the default recipe too where none is wanted: Hydra looks for it before it leaves it out
        register_recipes([dict(chosen).get(RECIPE_GROUP) or "default"])
    appended = {key for key, _ in chosen if alone and "/" not in key}
    tree = None
    while tree is None:
        overrides = [_group_word(key, choice, key in appended) for key, choice in chosen]
        try:
            with initialize_config_dir(str(paths.CONF), version_base="1.3"):
                tree = compose(None if alone else "config", overrides=overrides, return_hydra_config=True)
        except HydraException as error:
            absent = re.search(r"Could not override '([^']+)'", str(error))
            if absent is None or absent[1] in appended:
                raise
            appended.add(absent[1])  # the chosen strategy has no such axis of its own: it gets one
    selected: Any = OmegaConf.to_container(tree.hydra.runtime.choices)
    OmegaConf.set_struct(tree, False)
    with open_dict(tree):
        tree.pop("hydra")
    return pickle.dumps(tree), selected


def _group_word(key: str, choice: str | None, append: bool) -> str:
    if choice is None:
        return f"~{key}"
    return f"{'+' if append else ''}{key}={choice}"


def _missing_choice(error: Any, words: Words) -> str:
    """The fault of a defaults list that names what is not there, for Hydra's exception about it."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    inside = re.search(r"In '([^']+)'", str(error))
    where = f" (conf/{inside[1]}.yaml)" if inside else ""
    for path in _recipes_behind(words.choices.get(RECIPE_GROUP, "default")):  # Hydra blames conf/config.yaml for these
        for number, line in enumerate(_text(path).splitlines(), 1):
            if re.search(rf"/{group}:\s*{re.escape(name)}\s*(#|$)", line):
                where = f" ({shown(path)}, line {number})"
    return f"{group}={name}{where}: {no_such_choice(name, error.options or [])}"


def _recipes_behind(name: str | None) -> list[Path]:
    """The file of a recipe and those of the recipes whose names occur in it, as they do where it builds on them."""
    files = {recipe_name(path): path for path in recipe_files()}
    found: list[Path] = []
    pending = [files[name]] if name in files else []
    while pending:
        found.append(pending.pop())
        text = _text(found[-1])
        pending += [
            path
            for other, path in files.items()
            if other in text and path not in [*found, *pending] and re.search(rf"\b{re.escape(other)}\b", text)
        ]
    return found


@until_changed
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def register_recipes(names: Iterable[str | None]) -> None:
    """Store recipes as choices of Hydra's group `recipe`, at the root of the configuration. UserError for a broken one.

    A group's name is its folder's name to Hydra, and recipes/ lies beside conf/: hence the store. Only what is asked
    for is read, so that a recipe that is not YAML is a fault of those alone who choose it.
    """
    import yaml
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for path in dict.fromkeys(path for name in names for path in _recipes_behind(name)):
        group, _, name = f"{RECIPE_GROUP}/{recipe_name(path)}".rpartition("/")
        try:
            node = OmegaConf.load(path)
        except yaml.YAMLError as error:
            raise UserError(yaml_fault(error, shown(path))) from None
        if not OmegaConf.is_dict(node):
            raise UserError(f"{shown(path)}: holds no keys")
        ConfigStore.instance().store(name=name, group=group, package="_global_", node=node)
