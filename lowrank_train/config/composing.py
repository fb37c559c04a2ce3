"""From the words of a command line to one validated configuration, without importing torch.

Hydra composes the chosen groups and the recipe; the values are laid on top here, and the finished tree is checked
against the schema, so that a slip in a recipe or a group file is refused just as one on the command line is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.carrying import carry_over, recipe_strategy, settle_either_or
from lowrank_train.config.checks import TASKS_WITH_RUN, cross_checks
from lowrank_train.config.errors import UserError
from lowrank_train.config.files import load_container
from lowrank_train.config.hydra_tree import hydra_tree
from lowrank_train.config.origins import Origins
from lowrank_train.config.paths import RECIPE_GROUP, group_choices, require_conf
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.suggest import suggest_key
from lowrank_train.config.validate import build, known_keys
from lowrank_train.config.words import Words, read_words


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
    """The chosen groups and the recipe, which may have been written for another strategy than the chosen one.

    Such a strategy is composed alone, so that a table of strategies composes everything else once.
    """
    of_strategy = {group: choice for group, choice in words.choices.items() if group.split("/")[0] == "strategy"}
    others = {group: choice for group, choice in words.choices.items() if group not in of_strategy}
    tree, selected = hydra_tree(words, others)
    recipe = selected.get(RECIPE_GROUP)
    own, laid = recipe_strategy(recipe) if recipe else (None, {})
    chosen = of_strategy.get("strategy") or own
    written_otherwise = laid and (chosen != own or len(of_strategy) > ("strategy" in of_strategy))
    if chosen is not None and of_strategy and (written_otherwise or not recipe):
        base, of_base = hydra_tree(words, {**of_strategy, "strategy": chosen}, alone=True)
        selected = {group: choice for group, choice in selected.items() if group.split("/")[0] != "strategy"} | of_base
        origins = Origins(words, selected)
        words.notes += carry_over(tree, base.strategy, chosen, own, laid, origins)
    else:
        if of_strategy:
            tree, selected = hydra_tree(words, words.choices)
        origins = Origins(words, selected)
        settle_either_or(tree, laid)
    for group, choice in of_strategy.items():
        axis = group.partition("/")[2]
        if choice is None and axis:  # and with the part what the strategy's file or the recipe says of it
            tree.strategy.pop(axis, None)
    return tree, origins


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
        composed, selected = hydra_tree(words, choices)
        for group in words.choices:
            key = group.replace("/", ".")
            node = OmegaConf.select(composed, key)
            if key == "data":
                kept = {name: OmegaConf.select(base, f"data.{name}") for name in ("tokenizer", "seq_len")}
                node = OmegaConf.merge(node, {name: value for name, value in kept.items() if value is not None})
            OmegaConf.update(base, key, node, merge=False, force_add=True)
        origins = Origins(words, selected, folder / "config.yaml")
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
