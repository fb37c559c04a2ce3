"""Sweeps (`-m`): Hydra's sweeper and launcher make the jobs; each job then runs as if typed alone."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.composing import compose, register_recipes
from lowrank_train.config.errors import EXIT_INTERRUPTED, UserError
from lowrank_train.config.paths import RECIPE_GROUP, group_choices


def sweep(argv: Sequence[str], run: Callable[[list[str]], int]) -> int:
    """Check every swept value once, then let Hydra call `run` with the words of each job; returns the worst exit code.

    A launcher that starts other processes (submitit) reports the failures of its jobs itself. Raises UserError.
    """
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        overrides = OverridesParser.create().parse_overrides(list(argv))
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None
    check_each_value(overrides)
    register_recipes(group_choices()[RECIPE_GROUP])
    fixed = sorted({override.key_or_group for override in overrides if not override.is_sweep_override()})
    exit_codes: list[int] = []

    def job(_: Any) -> None:
        exit_codes.append(_run_job(run))

    before = sys.argv
    sys.argv = [before[0], "--multirun", *(_forced(override) for override in overrides)]
    sys.argv.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    try:
        hydra.main(config_path=str(paths.CONF), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before
    return max(exit_codes, default=0)


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


def _run_job(run: Callable[[list[str]], int]) -> int:
    """One job, under a run name of its own."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    settings, sweeping = HydraConfig.get(), GlobalHydra.instance().hydra
    words = [str(word) for word in settings.overrides.task]
    GlobalHydra.instance().clear()  # Hydra composes one thing at a time
    try:
        config = compose(words)
        if config.task == "train":
            swept = re.sub(r"[^\w.,=-]+", "_", str(settings.job.override_dirname).replace("++", ""))
            words.append(f"run_name={config.run_name}-{swept}")
        exit_code = run(words)
    finally:
        GlobalHydra.instance().hydra = sweeping
    if exit_code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return exit_code


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
