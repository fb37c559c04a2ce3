"""The command line: `lowrank VERB KEY=VALUE ...`, from the words to the verb's function and its exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from lowrank_train import __version__
from lowrank_train.config.errors import (
    EXIT_DISK_FULL,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_MEMORY,
    EXIT_USAGE,
    RunStopped,
    UserError,
)
from lowrank_train.config.schema import RunConfig
from lowrank_train.verbs import TAKE_FOLDERS, VERBS, help_page, split_verb, with_folders, with_task

ENVIRONMENT = {
    # Threads that spin while they wait make a step tens of times slower as soon as anything else runs.
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",  # its threads and forked loader processes do not go together
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
ALLOCATOR_KEYS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9

OUT_OF_MEMORY = """Out of memory. What needs less, cheapest first:
  trainer.batch_size=HALF trainer.total_batch_size=THE_SAME   smaller micro-batches, the same update
  model.activation_checkpointing=true                         recomputes each layer: about a third more compute
  strategy.when=project_in_backward                           frees each full gradient at once
  precision=bf16                                              half the bytes of weights and state
  strategy.subspace.rank=SMALLER                              less optimizer state"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    set_environment()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        return _print_faults(error)
    except RunStopped as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RuntimeError, MemoryError, OSError) as error:
        return _exit_code_of(error)


def set_environment() -> None:
    """Settings that libraries read when they are first imported; what the user has set stays."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not any(key in os.environ for key in ALLOCATOR_KEYS):
        os.environ[ALLOCATOR_KEYS[0]] = "expandable_segments:True"  # against memory lost to fragmentation


def _print_faults(error: UserError) -> int:
    if len(error.faults) > 1:
        print(f"{len(error.faults)} faults:", file=sys.stderr)
    for fault in error.faults:
        print(f"- {fault}", file=sys.stderr)
    return EXIT_USAGE


def _exit_code_of(error: RuntimeError | MemoryError | OSError) -> int:
    """Exit code of the failures that a user can do something about; anything else is raised again."""
    names = {cls.__name__ for cls in type(error).__mro__}
    signs = ("can't allocate memory", "not enough memory")  # training says it better: memory/out_of_memory.py
    if names & {"OutOfMemoryError", "MemoryError"} or any(sign in str(error) for sign in signs):
        print(f"{OUT_OF_MEMORY}\n({str(error).splitlines()[0] if str(error) else 'MemoryError'})", file=sys.stderr)
        return EXIT_OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        print(f"No space left on the disk{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return EXIT_DISK_FULL
    raise error


def _run(argv: list[str]) -> int:
    if "--version" in argv:
        print(f"lowrank_train {__version__}")
        return 0
    verb, rest = split_verb(argv)
    if verb == "help" or {"-h", "--help"} & set(rest):
        print(help_page())
        return 0
    if verb == "recipes":
        from lowrank_train.config.recipes import show_recipes

        return show_recipes(rest)
    rest, print_config = _take_config_flag(rest)
    if verb is not None:
        rest = with_task(with_folders(rest) if verb in TAKE_FOLDERS else rest, verb)
    if {"-m", "--multirun"} & set(rest):
        from lowrank_train.config.sweeps import run_apart, sweep
        from lowrank_train.report.compare import compare_sweep

        return sweep([word for word in rest if word not in ("-m", "--multirun")], run_apart, main, compare_sweep)
    if "strategy=all" in rest and "task=plan" in rest and not print_config:
        from lowrank_train.memory.all_strategies import plan_all

        return plan_all([word for word in rest if word not in ("strategy=all", "task=plan")])
    if "task=support" in rest and not print_config:
        from lowrank_train.support_table import support_all, with_defaults

        rest = with_defaults(rest)
        if "strategy=all" in rest or not any(word.startswith("strategy=") for word in rest):
            return support_all([word for word in rest if word not in ("strategy=all", "task=support")])
    from lowrank_train.config import compose, to_yaml

    notes: list[str] = []
    config = compose(rest, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if print_config:
        print(to_yaml(config), end="")
        return 0
    if config.task == "train":
        from lowrank_train.config.launch import check_launch

        check_launch(config, os.environ)  # now, when the processes have not yet begun to wait for each other
        from lowrank_train.train.slurm import coming_back

        with coming_back(os.environ):
            return dispatch(config)
    if config.task == "plan" and config.fit:
        from lowrank_train.memory.fit_table import fit

        return fit(config, rest)  # which ends with a command line made of the given one
    return dispatch(config)


def dispatch(config: RunConfig) -> int:
    """Call the function of the configuration's task; only now is anything heavy imported."""
    function = next(verb.function for verb in VERBS if verb.task == config.task)
    module, _, name = function.partition(":")
    call: Callable[[RunConfig], int] = getattr(importlib.import_module(module), name)
    return call(config)


def _take_config_flag(words: list[str]) -> tuple[list[str], bool]:
    """Take `--cfg job` out of the words."""
    rest, wanted, pending = [], False, False
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--cfg", "-c"):
            wanted, pending = True, not equals
        elif pending:
            value, pending = word, False
        else:
            rest.append(word)
            continue
        if value not in ("", "job"):
            raise UserError(f"--cfg {value}: write --cfg job.")
    return rest, wanted
