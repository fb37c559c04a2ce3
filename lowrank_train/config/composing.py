"""From the words of a command line to one validated configuration, without importing torch.

Hydra composes the chosen groups and the recipe; the values are laid on top here, and the finished tree is checked
against the schema, so that a slip in a recipe or a group file is refused just as one on the command line is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.carrying import carry_over, settle_either_or
from lowrank_train.config.checks import TASKS_WITH_RUN, cross_checks
from lowrank_train.config.errors import UserError
from lowrank_train.config.files import load_container, yaml_fault
from lowrank_train.config.origins import Origins
from lowrank_train.config.paths import RECIPE_GROUP, group_choices, recipe_files, recipe_name, require_conf, shown
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.suggest import nearest, suggest_key
from lowrank_train.config.validate import build, known_keys
from lowrank_train.config.words import Words, no_such_choice, read_words

_STRATEGIES: dict[tuple[Any, ...], Mapping[str, Any]] = {}
"""Folder and choices -> what a strategy's files say: a grid or a table composes the same ones again and again."""

MOST_REPAIRS = 8  # wrong choices inside files that are looked past to find more faults


def compose(argv: Sequence[str], notes: list[str] | None = None) -> RunConfig:
    """The validated configuration for the words of a command line; raises UserError with every fault found.

    What a user should know although it is no fault, such as a recipe's key that was left out, goes into `notes`.
    """
    require_conf()
    words = read_words(argv, group_choices())
    tree, origins = _base_from_run(words) or _with_recipe(words)
    if notes is not None:
        notes += words.notes
    _lay_values(tree, words)
    resolved = _resolved(tree, words)
    config, faults = (None, []) if resolved is None else build(resolved)
    written = [*words.faults, *(fault.sentence(origins.of(fault.key)) for fault in faults)]
    if config is None or written:
        raise UserError(list(dict.fromkeys(written)))
    _fill_in(config, origins)
    problems = cross_checks(config)
    if problems:
        raise UserError(problems)
    return config


def _with_recipe(words: Words) -> tuple[Any, Origins]:
    """The chosen groups and the recipe, which may have been written for another strategy than the chosen one."""
    tree, origins = _composed(words)

    def compose_strategy(choices: Mapping[str, str | None]) -> Mapping[str, Any]:
        key = (paths.CONF, *choices.items())
        found = _STRATEGIES.get(key)
        if found is None:
            faults = len(words.faults)
            found = _composed(words, {**choices, RECIPE_GROUP: None})[0].strategy
            if len(words.faults) == faults:  # else a wrong choice was looked past
                _STRATEGIES[key] = found
        return copy.deepcopy(found)

    words.notes += carry_over(tree, words, origins, compose_strategy)
    for group, choice in words.choices.items():
        axis = group.partition("/")[2]
        if choice is None and axis:  # and with the part what the strategy's file or the recipe says of it
            tree.strategy.pop(axis, None)
    return tree, origins


def _composed(words: Words, choices: Mapping[str, str | None] | None = None) -> tuple[Any, Origins]:
    """Hydra's composition of the chosen groups and the recipe, and where each key of it came from."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    chosen: dict[str, str | None] = dict(words.choices if choices is None else choices)
    try:
        # the default one too where none is wanted: Hydra looks for it before it leaves it out
        register_recipes([chosen.get(RECIPE_GROUP) or "default"])
    except UserError as error:
        raise UserError([*words.faults, *error.faults]) from None
    appended: set[str] = set()
    for _ in range(MOST_REPAIRS):
        overrides = [_group_word(key, choice, key in appended) for key, choice in chosen.items()]
        try:
            with initialize_config_dir(str(paths.CONF), version_base="1.3"):
                tree = hydra_compose("config", overrides=overrides, return_hydra_config=True)
        except MissingConfigException as error:
            words.faults.append(_missing_choice(error, words))
            missing = error.missing_cfg_file or ""
            group, _, name = missing.rpartition("/")
            close = nearest(name, error.options or [], limit=len(name))
            if not close or chosen.get(group) == close:
                break
            chosen[group] = close
        except HydraException as error:
            absent = re.search(r"Could not override '([^']+)'", str(error))
            if absent is None or absent[1] in appended:
                words.faults.append(" ".join(str(error).split()))
                break
            appended.add(absent[1])  # the chosen strategy has no such axis of its own: it gets one
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            mark = getattr(error, "problem_mark", None)
            path = shown(Path(mark.name)) if mark else "conf"
            words.faults.append(
                yaml_fault(error, path) if isinstance(error, yaml.YAMLError) else str(error).splitlines()[0]
            )
            break
        else:
            selected = OmegaConf.to_container(tree.hydra.runtime.choices)
            assert isinstance(selected, dict)
            OmegaConf.set_struct(tree, False)
            with open_dict(tree):
                tree.pop("hydra")
            return tree, Origins(words, selected)
    raise UserError(words.faults)


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
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(rf"/{group}:\s*{re.escape(name)}\s*(#|$)", line):
                where = f" ({shown(path)}, line {number})"
    return f"{group}={name}{where}: {no_such_choice(name, error.options or [])}"


def _recipes_behind(name: str | None) -> list[Path]:
    """The file of a recipe and those of the recipes whose names occur in it, as they do where it builds on them."""
    found: list[Path] = []
    pending = [path for path in recipe_files() if recipe_name(path) == name]
    while pending:
        found.append(pending.pop())
        text = found[-1].read_text(encoding="utf-8")
        pending += [
            path
            for path in recipe_files()
            if path not in [*found, *pending] and re.search(rf"\b{re.escape(recipe_name(path))}\b", text)
        ]
    return found


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


def _base_from_run(words: Words) -> tuple[Any, Origins] | None:
    """The configuration in the run folder that `run=` names; None where there is no such folder to start from.

    Groups chosen beside it replace its nodes, but the tokenizer and the length of a row stay: they belong to the model.
    """
    run = words.value("run")
    if not isinstance(run, str) or words.value("task") not in TASKS_WITH_RUN:
        return None
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        if not (folder / "config.json").is_file():
            words.faults.append(
                f"run={run}: there is neither config.yaml (a run folder) nor config.json (a Hugging Face folder) in it"
            )
        elif words.value("data.tokenizer") is None:
            words.values.insert(0, ("data.tokenizer", run))
        return None
    from omegaconf import OmegaConf

    base = OmegaConf.create(load_container(folder / "config.yaml"))
    if words.choices.pop(RECIPE_GROUP, None) is not None:
        words.faults.append("recipe: a run brings its own configuration; leave out recipe= beside run=")
    origins = Origins(words, {}, folder / "config.yaml")
    if words.choices:
        choices = {RECIPE_GROUP: None, **words.choices}
        composed, origins = _composed(words, choices)
        for group in words.choices:
            key = group.replace("/", ".")
            node = OmegaConf.select(composed, key)
            if key == "data":
                kept = {name: OmegaConf.select(base, f"data.{name}") for name in ("tokenizer", "seq_len")}
                node = OmegaConf.merge(node, {name: value for name, value in kept.items() if value is not None})
            OmegaConf.update(base, key, node, merge=False, force_add=True)
        origins = Origins(words, origins.selected, folder / "config.yaml")
    words.values[:0] = [(key, None) for key in ("run", "out")]
    return base, origins


def _lay_values(tree: Any, words: Words) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, value in words.values:
        try:
            OmegaConf.update(tree, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError) as error:  # a mapping for a list, `${` without its end, ...
            words.faults.append(f"{key}={value}: cannot be put there ({str(error).splitlines()[0]})")
    settle_either_or(tree, dict(words.values))
    for key in words.deletions:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(tree, parent) if parent else tree
        if not OmegaConf.is_dict(node) or name not in node:
            container: Any = OmegaConf.to_container(tree)
            found = suggest_key(key, list(node) if OmegaConf.is_dict(node) else [], known_keys(container))
            if found == key:  # a key of the schema that this configuration does without anyway
                continue
            words.faults.append(f"~{key}: there is no such key{f'. Did you mean ~{found}?' if found else ''}")
        else:
            node.pop(name)


def _resolved(tree: Any, words: Words) -> dict[str, Any] | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        container = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        words.faults.append(f"{error.full_key}: {str(error).splitlines()[0]}")
        return None
    assert isinstance(container, dict)
    resolved: dict[str, Any] = {str(key): value for key, value in container.items()}
    if isinstance(resolved.get("resume"), bool):
        resolved["resume"] = str(resolved["resume"]).lower()  # `resume: false` in a recipe; the key takes text
    return resolved


def _fill_in(config: RunConfig, origins: Origins) -> None:
    """What follows from other keys, so that the saved configuration is complete."""
    if (
        config.model.kind == "hf"
        and config.model.path
        and not origins.of("data.tokenizer").startswith(("command line", "recipes/"))
    ):
        config.data.tokenizer = config.model.path
    data = config.data
    data.train, data.validation = [_found(path) for path in data.train], [_found(path) for path in data.validation]
    data.tokenizer = _found(data.tokenizer)
    if config.run_name is None:
        config.run_name = f"{config.model.name}-{config.strategy.name}-{config.data.task or config.data.name}"


def _found(path: str) -> str:
    """A path that is not there from the current folder but lies in the project (what it bundles), made absolute."""
    if "://" in path or not path or Path(path).exists() or not (paths.ROOT / path).exists():
        return path
    return str(paths.ROOT / path)
