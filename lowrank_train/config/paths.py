"""Where the YAML of the project lies, and which choices each group has, read off the folders."""

from __future__ import annotations

from pathlib import Path

from lowrank_train.config.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
RECIPES = ROOT / "recipes"
RECIPE_GROUP = "recipe"


def require_conf() -> None:
    """Stop with the way out where the package was installed without the YAML beside it."""
    if not (CONF / "config.yaml").is_file():
        raise UserError(f"{CONF / 'config.yaml'} is missing: run from a checkout installed with `pip install -e .`.")


def group_choices() -> dict[str, list[str]]:
    """The choices of every group: `strategy/subspace` -> [randomized, svd]; recipes are the group `recipe`."""
    choices = {RECIPE_GROUP: [recipe_name(path) for path in recipe_files()]}
    for path in sorted(CONF.rglob("*.yaml")):
        if path.parent != CONF:
            choices.setdefault(path.parent.relative_to(CONF).as_posix(), []).append(path.stem)
    return choices


def recipe_files() -> list[Path]:
    """Every recipe, in the order of their names."""
    return sorted(RECIPES.rglob("*.yaml"))


def recipe_name(path: Path) -> str:
    """What `recipe=` calls a file: `galore_60m`, or `mine/x` for one in a folder."""
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def shown(path: Path) -> str:
    """The path as a reader of the project would write it: relative to its root where it lies in it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
