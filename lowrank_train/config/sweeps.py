"""Sweeps (`-m`): Hydra's sweeper and launcher make the jobs; each job then runs as if typed alone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.composing import compose
from lowrank_train.config.errors import EXIT_INTERRUPTED, UserError
from lowrank_train.config.files import load_container
from lowrank_train.config.hydra_tree import register_recipes
from lowrank_train.config.paths import RECIPE_GROUP, group_choices
from lowrank_train.config.sweep_jobs import Job, forget_jobs, recorded_jobs, run_folders
from lowrank_train.config.words import no_such_choice

UNFIT_FOR_A_NAME = re.compile(r"[^\w.,=-]+")
LAUNCHER = "launcher"  # the group that says where the jobs of a sweep run; no key of a run itself

Run = Callable[[list[str]], int]


def sweep(argv: Sequence[str], run: Run, run_here: Run, compare: Callable[[list[Path], Path], None]) -> int:
    """Check every swept value once, let Hydra call `run` with the words of each job, then `compare` the runs.

    A job that submitit has started has a process of its own already, and calls `run_here` in it. `compare` gets the run
    folders and the sweep's own folder. Returns the worst exit code of the jobs. Raises UserError.
    """
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        overrides = OverridesParser.create().parse_overrides([*argv, *grid_words(argv)])
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None
    require_launcher(argv)
    check_each_value(overrides)
    register_recipes(group_choices()[RECIPE_GROUP])
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    fixed = sorted({override.key_or_group for override in overrides} - swept)
    given = (override.value() for override in overrides if override.key_or_group == "hydra.sweep.dir")
    folder = Path(str(next(given, time.strftime("runs/sweeps/%Y-%m-%d_%H-%M-%S"))))

    def job(_: Any) -> None:
        _run_job(run, run_here)

    forget_jobs(folder)  # of an earlier sweep that was told to use the same folder
    before = sys.argv
    sys.argv = [before[0], "--multirun", *(_forced(override) for override in overrides)]
    sys.argv.append(f"hydra.sweep.dir='{folder}'")
    sys.argv.append("hydra.sweeper.params=null")  # the grid stands among the words already
    sys.argv.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    try:
        hydra.main(config_path=str(paths.CONF), config_name="config", version_base="1.3")(job)()
    except (KeyboardInterrupt, SystemExit):  # the latter is how Hydra ends when a launcher fails
        if is_remote(argv):
            print(f"Submitted jobs go on. Once they are done: lowrank compare {folder}", file=sys.stderr)
        raise
    finally:
        sys.argv = before
    trained = run_folders(folder)
    if trained:
        compare(trained, folder)
    return max((job.exit_code or 0 for job in recorded_jobs(folder)), default=0)


def is_remote(argv: Sequence[str]) -> bool:
    """Whether the words choose a launcher that hands the jobs to Slurm."""
    return any(word in (f"{LAUNCHER}=slurm", "hydra/launcher=submitit_slurm") for word in argv)


def require_launcher(argv: Sequence[str]) -> None:
    """UserError where there is no such launcher, it is not installed, or there is nothing to submit to."""
    for name in (word.partition("=")[2] for word in argv if word.startswith(f"{LAUNCHER}=")):
        if name not in group_choices()[LAUNCHER]:
            raise UserError(f"{LAUNCHER}={name}: {no_such_choice(name, group_choices()[LAUNCHER])}")
    if not is_remote(argv):
        return
    if importlib.util.find_spec("submitit") is None:
        raise UserError(
            f"{LAUNCHER}=slurm: the package hydra-submitit-launcher is not installed; pip install -e '.[slurm]', or "
            f"{LAUNCHER}=local"
        )
    missing = [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{LAUNCHER}=slurm: there is no {' and no '.join(missing)} on this machine; start the sweep where jobs are "
            f"submitted, or use {LAUNCHER}=local"
        )


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
        if not override.key_or_group.startswith("hydra") and override.key_or_group != LAUNCHER
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


def _run_job(run: Run, run_here: Run) -> None:
    """One job, under a run name of its own; KeyboardInterrupt where it was interrupted."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    settings, sweeping = HydraConfig.get(), GlobalHydra.instance().hydra
    words = [str(word) for word in settings.overrides.task if not str(word).startswith(f"{LAUNCHER}=")]
    folder, number = Path(settings.sweep.dir), int(settings.job.num)
    submitted = "SUBMITIT_EXECUTOR" in os.environ
    GlobalHydra.instance().clear()  # Hydra composes one thing at a time
    try:
        config = compose(words)
        run_folder = None
        if config.task == "train":
            swept = str(settings.job.override_dirname).replace("++", "")
            name = f"{config.run_name}-{re.sub(UNFIT_FOR_A_NAME, '_', swept)}"
            if not submitted:
                name = _free_name(name, folder)
            elif re.search(UNFIT_FOR_A_NAME, swept):
                name += f".{number}"  # jobs side by side do not see each other's names
            words.append(f"run_name={name}")
            run_folder = str(Path(config.output_dir) / name)
        speaks = os.environ.get("SLURM_PROCID", "0") == "0" or not submitted
        if speaks:
            Job(run_folder, None).record(folder, number)
        exit_code = run_here(words) if submitted else run(words)
        if speaks:
            Job(run_folder, exit_code).record(folder, number)
    finally:
        GlobalHydra.instance().hydra = sweeping
    if exit_code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt


def _free_name(name: str, folder: Path) -> str:
    """The name, or with a number where an earlier job of the sweep has it: values may differ in signs alone."""
    taken = {run.name for run in run_folders(folder)}
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
