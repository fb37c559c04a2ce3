"""Sweeps (`-m`): Hydra's sweeper and launcher make the jobs; each job then runs as if typed alone."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.composing import compose, register_recipes
from lowrank_train.config.errors import EXIT_INTERRUPTED, UserError
from lowrank_train.config.files import load_container
from lowrank_train.config.paths import RECIPE_GROUP, group_choices


@dataclass
class Jobs:
    """What came of the jobs that ran from this process."""

    exit_codes: list[int] = field(default_factory=list)
    run_folders: list[Path] = field(default_factory=list)
    sweep_folder: Path | None = None  # where Hydra keeps its list of the jobs


def sweep(
    argv: Sequence[str],
    run: Callable[[list[str]], int],
    compare: Callable[[list[Path], Path], None],
) -> int:
    """Check every swept value once, let Hydra call `run` with the words of each job, then `compare` the runs.

    `compare` gets the run folders and the sweep's own folder. Returns the worst exit code of the jobs. A launcher that
    starts other processes (submitit) reports the failures of its jobs itself, and `lowrank compare` does the rest.
    Raises UserError.
    """
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        overrides = OverridesParser.create().parse_overrides([*argv, *grid_words(argv)])
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None
    check_each_value(overrides)
    register_recipes(group_choices()[RECIPE_GROUP])
    fixed = sorted({override.key_or_group for override in overrides if not override.is_sweep_override()})
    jobs = Jobs()

    def job(_: Any) -> None:
        _run_job(run, jobs)

    before = sys.argv
    sys.argv = [before[0], "--multirun", *(_forced(override) for override in overrides)]
    sys.argv.append("hydra.sweeper.params=null")  # the grid stands among the words already
    sys.argv.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    try:
        hydra.main(config_path=str(paths.CONF), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before
    if jobs.run_folders and jobs.sweep_folder is not None:
        compare(jobs.run_folders, jobs.sweep_folder)
    return max(jobs.exit_codes, default=0)


def grid_words(argv: Sequence[str]) -> list[str]:
    """KEY=VALUES of the grid in the chosen recipe, without the keys that the command line gives itself."""
    given = {word.partition("=")[0].lstrip("+~"): word.partition("=")[2] for word in argv}
    grid = grid_of(given[RECIPE_GROUP]) if RECIPE_GROUP in given else {}
    return [f"{key}={values}" for key, values in grid.items() if key not in given]


def grid_of(recipe: str) -> dict[str, str]:
    """`hydra.sweeper.params` of a recipe: key -> values with commas between them, as on the command line."""
    path = paths.RECIPES / f"{recipe}.yaml"
    node = load_container(path) if path.is_file() else {}
    for name in ("hydra", "sweeper", "params"):
        node = node.get(name) or {}
    return {str(key): str(values) for key, values in node.items()}


def check_each_value(overrides: Iterable[Any]) -> None:
    """Compose every value of each swept word beside the first values of the others; raises UserError with all faults.

    The sum of the numbers of values, not their product. What only a sweeper can enumerate is left to it.
    """
    values = {
        override.input_line: list(override.sweep_string_iterator())
        if override.is_choice_sweep() or override.is_range_sweep()
        else []
        for override in overrides
        if not override.key_or_group.startswith("hydra")
    }
    plain = [override.input_line for override in overrides if not override.is_sweep_override()]
    plain = [line for line in plain if line in values]
    swept = {line: [f"{line.partition('=')[0]}={value}" for value in found] for line, found in values.items() if found}
    faults: list[str] = []
    for line in swept or {"": [""]}:
        for word in swept.get(line, [""]):
            others = [found[0] for other, found in swept.items() if other != line]
            try:
                compose([*plain, *others, *([word] if word else [])])
            except UserError as error:
                faults += error.faults
    if faults:
        raise UserError(list(dict.fromkeys(faults)))


def _forced(override: Any) -> str:
    """Values are laid over whatever is there: which keys exist is for our schema to say, not for the YAML."""
    line: str = override.input_line
    key: str = override.key_or_group
    is_choice = key in group_choices() or "/" in key or key.startswith("hydra")
    return line if is_choice or override.is_delete() else f"++{line.lstrip('+')}"


def _run_job(run: Callable[[list[str]], int], jobs: Jobs) -> None:
    """One job, under a run name of its own; KeyboardInterrupt where it was interrupted."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    settings, sweeping = HydraConfig.get(), GlobalHydra.instance().hydra
    words = [str(word) for word in settings.overrides.task]
    GlobalHydra.instance().clear()  # Hydra composes one thing at a time
    try:
        config = compose(words)
        if config.task == "train":
            swept = re.sub(r"[^\w.,=-]+", "_", str(settings.job.override_dirname).replace("++", ""))
            name = _free_name(f"{config.run_name}-{swept}", jobs)
            words.append(f"run_name={name}")
            jobs.run_folders.append(Path(config.output_dir) / name)
        jobs.sweep_folder = Path(settings.sweep.dir)
        jobs.exit_codes.append(run(words))
    finally:
        GlobalHydra.instance().hydra = sweeping
    if jobs.exit_codes[-1] == EXIT_INTERRUPTED:
        raise KeyboardInterrupt


def _free_name(name: str, jobs: Jobs) -> str:
    """The name, or with a number where an earlier job of the sweep has it: values may differ in signs alone."""
    taken = {folder.name for folder in jobs.run_folders}
    return next(free for free in (name, *(f"{name}.{number}" for number in range(2, 9999))) if free not in taken)


def run_apart(words: list[str]) -> int:
    """Run a command line in a process of its own: nothing of one job, its memory or its process group, meets the next.

    Ctrl-C reaches that process too; it saves and ends, and only then does this one go on.
    """
    with subprocess.Popen([sys.executable, str(paths.ROOT / "train.py"), *words]) as process:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
