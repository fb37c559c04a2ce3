"""What a recipe says of its strategy, beside another strategy or another part than it was written for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.origins import Origins
from lowrank_train.config.parts import TARGET, NoSuchPart, arguments_of
from lowrank_train.config.paths import RECIPE_GROUP, until_changed

EITHER_OR = (("strategy.subspace.rank", "strategy.subspace.density"),)
"""Two ways to say one thing: whichever is set later takes the place of the other."""

OF_THE_RUN = ("when", "basis_under_accumulation", "select")
"""Keys of the strategy that belong to the machine or the model, and so go with any strategy."""

BUDGET = ("rank", "density", "every")
"""Keys that mean the same for every subspace; those of another axis only go with the class they were written for."""


def carry_over(
    tree: Any, base: Mapping[str, Any], chosen: str, own: str | None, laid: Mapping[str, Any], origins: Origins
) -> list[str]:
    """Put the strategy `base` into `tree`, with what a recipe wrote for another one as far as it fits.

    `tree` holds the strategy that the recipe was written for, `own` is its name, and `laid` are the keys that the
    recipe sets of it. Gives what was left out: a key goes where the chosen strategy has no such axis or argument, or
    sets it in its own file.
    """
    from omegaconf import OmegaConf

    written_for = tree.strategy
    of_the_method = dict(flat(_body(f"strategy/{chosen}"), "strategy.")) if chosen != own else {}
    carried, notes = {}, []
    for key, value in laid.items():
        reason = _misfit(key, base, written_for, of_the_method, chosen)
        if reason is None:
            carried[key] = value
        else:
            notes.append(f"{key}={value} ({origins.of(key)}) is left out: {reason}")
    OmegaConf.update(tree, "strategy", base, merge=False)
    for key, value in carried.items():
        OmegaConf.update(tree, key, value, force_add=True)
    settle_either_or(tree, carried)
    return notes


def settle_either_or(tree: Any, laid: Mapping[str, Any]) -> None:
    """Where one of two keys that exclude each other was laid over the tree, the other one becomes null."""
    from omegaconf import OmegaConf

    for pair in EITHER_OR:
        for key, other in (pair, pair[::-1]):
            if laid.get(key) is not None and other not in laid and OmegaConf.select(tree, other) is not None:
                OmegaConf.update(tree, other, None)


def _misfit(
    key: str, base: Mapping[str, Any], written_for: Mapping[str, Any], of_the_method: Mapping[str, Any], chosen: str
) -> str | None:
    """Why what a recipe wrote for one strategy cannot be said of another; None where it can."""
    _, axis, *rest = key.split(".")
    if not rest:
        fits = axis in OF_THE_RUN and (axis != "select" or base.get("select"))
        return None if fits or key not in of_the_method else f"strategy {chosen} has its own"
    part, before = base.get(axis), written_for.get(axis)
    if not part:
        return f"strategy {chosen} has no {axis}"
    name, target = rest[0], str(part.get(TARGET))
    try:
        known = name in arguments_of(target)
    except NoSuchPart:
        return None  # a fault of its own, with the key
    if not known:
        return f"{target.rpartition('.')[2]} takes no {name}"
    rivals = [other for pair in EITHER_OR if key in pair for other in pair]
    if any(of_the_method.get(rival) is not None for rival in rivals or [key]):
        return f"strategy {chosen} sets its own"
    if name not in BUDGET and target != str((before or {}).get(TARGET)):
        return f"it was written for another {axis}"
    return None


def recipe_strategy(recipe: str) -> tuple[str | None, dict[str, Any]]:
    """The strategy that a recipe and those it builds on choose, and the keys of it that they set."""
    path = paths.RECIPES / f"{recipe}.yaml"
    node = _node(path) if path.is_file() else None
    if not isinstance(node, dict):
        return None, {}
    chosen: str | None = None
    keys: dict[str, Any] = {}
    for entry in node.get("defaults", []):
        for group, choice in entry.items() if isinstance(entry, dict) else [(str(entry), None)]:
            group = group.removeprefix("override ").strip("/")
            if group == "strategy":
                chosen = choice
            elif group.partition("/")[0] == RECIPE_GROUP:
                above = group.partition("/")[2] or choice
                inherited, inherited_keys = recipe_strategy(str(above))
                chosen, keys = inherited or chosen, {**keys, **inherited_keys}
    return chosen, {**keys, **dict(flat(node.get("strategy") or {}, "strategy."))}


def _body(choice: str) -> dict[str, Any]:
    """What the file of a choice sets itself, beside its defaults list."""
    node = _node(paths.CONF / f"{choice}.yaml")
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items() if key != "defaults"}


@until_changed
def _node(path: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


def flat(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
