"""The command line: `lowrank VERB KEY=VALUE ...`, from the words to the verb's function and its exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_train import __version__
from lowrank_train.config.errors import (
    EXIT_DISK_FULL,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_MEMORY,
    EXIT_USAGE,
    RunStopped,
    UserError,
)
from lowrank_train.config.paths import group_choices
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.suggest import nearest


@dataclass(frozen=True)
class Verb:
    """A task: the words that call it, the function that does it (imported when called), and what it does."""

    words: str
    task: str
    function: str
    summary: str
    example: str


VERBS = (
    Verb("train", "train", "lowrank_train.train.run:train", "train a model", "recipe=galore_60m"),
    Verb(
        "explain",
        "explain",
        "lowrank_train.explain:explain",
        "what a strategy does with each tensor",
        "strategy=fira model=llama_60m",
    ),
    Verb(
        "plan",
        "plan",
        "lowrank_train.memory.plan:plan",
        "what a run will hold, whether it fits, how long it takes",
        "recipe=galore_7b_4090 card=4090",
    ),
    Verb("export", "export", "lowrank_train.export:export", "write a Hugging Face folder", "run=runs/NAME out=FOLDER"),
    Verb(
        "evaluate",
        "evaluate",
        "lowrank_train.evaluate.command:evaluate_command",
        "perplexity of a run or a Hugging Face folder",
        "run=runs/NAME data=c4",
    ),
    Verb(
        "generate",
        "generate",
        "lowrank_train.evaluate.generate:generate",
        "sample text",
        "run=runs/NAME generate.prompt='Once upon a time'",
    ),
    Verb(
        "data prepare",
        "data_prepare",
        "lowrank_train.data.prepare:prepare",
        "tokenize a corpus once, into shards on disk",
        "data=c4 out=FOLDER",
    ),
    Verb(
        "doctor",
        "doctor",
        "lowrank_train.doctor.command:doctor",
        "what of this machine is ready for training",
        "format=json",
    ),
    Verb(
        "compare",
        "compare",
        "lowrank_train.report.compare:compare",
        "runs side by side, and beside a paper's table",
        "runs/* paper=galore_table2",
    ),
    Verb("card", "card", "lowrank_train.report.page:card", "make a run's card.html anew", "runs/NAME"),
)

TAKE_FOLDERS = ("compare", "card")  # verbs whose words without a key are run folders

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
        rest = _with_task(with_folders(rest) if verb in TAKE_FOLDERS else rest, verb)
    if {"-m", "--multirun"} & set(rest):
        from lowrank_train.config.sweeps import run_apart, sweep
        from lowrank_train.report.compare import compare_sweep

        return sweep([word for word in rest if word not in ("-m", "--multirun")], run_apart, compare_sweep)
    if "strategy=all" in rest and "task=plan" in rest and not print_config:
        from lowrank_train.memory.all_strategies import plan_all

        return plan_all([word for word in rest if word not in ("strategy=all", "task=plan")])
    from lowrank_train.config import compose, to_yaml

    notes: list[str] = []
    config = compose(rest, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if print_config:
        print(to_yaml(config), end="")
        return 0
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


def split_verb(argv: list[str]) -> tuple[str | None, list[str]]:
    """The verb (None where there is none) and the words that remain; raises UserError for an unknown one."""
    if not argv or "=" in argv[0] or argv[0][:1] in "-+~":
        return None, argv
    names = [verb.words for verb in VERBS]
    for name in [*names, "recipes", "help"]:
        length = len(name.split())
        if " ".join(argv[:length]) == name:
            return name, argv[length:]
    known = [*names, "recipes", "help"]
    close = (
        nearest(argv[0], known)
        or nearest(" ".join(argv[:2]), known)
        or next((name for name in names if name.split()[0] == argv[0]), None)
    )
    raise UserError(
        f"{argv[0]}: there is no such verb.{f' Did you mean {close}?' if close else ''} Verbs: {', '.join(known)}."
    )


def _with_task(words: list[str], verb: str) -> list[str]:
    task = next(item.task for item in VERBS if item.words == verb)
    others = [word for word in words if word.lstrip("+").startswith("task=") and word.partition("=")[2] != task]
    if others:
        raise UserError(f"{others[0]}: the verb {verb} says task={task}; leave out one of the two.")
    return [*words, f"task={task}"]


def with_folders(words: list[str]) -> list[str]:
    """Words that are folders, or no KEY=VALUE, gathered into runs=[...]; names of swept runs hold `=` and commas."""
    folders = [word for word in words if word[:1] not in "-+~" and ("=" not in word or Path(word).exists())]
    if not folders:
        return words
    quoted = ["'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in folders]
    return [*(word for word in words if word not in folders), f"runs=[{','.join(quoted)}]"]


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


def help_page() -> str:
    """Verbs, groups with their choices, examples."""
    width = max(len(verb.words) for verb in VERBS) + 2
    verbs = [f"  {verb.words:<{width}}{verb.summary}: lowrank {verb.words} {verb.example}" for verb in VERBS]
    verbs.append(f"  {'recipes':<{width}}list the recipes; with a name, print one")
    verbs.append(f"  {'help':<{width}}this page")
    indent = " " * (width + 8)
    groups = [
        textwrap.fill(", ".join(choices), 118, initial_indent=f"  {group:<{width + 6}}", subsequent_indent=indent)
        for group, choices in group_choices().items()
        if group != "recipe"
    ]
    return "\n".join(
        [
            "lowrank VERB KEY=VALUE ...        (python train.py KEY=VALUE ... trains)",
            "",
            "Verbs",
            *verbs,
            "",
            "Groups: GROUP=CHOICE",
            f"  {'recipe':<{width + 6}}a whole run: see `lowrank recipes`",
            *groups,
            "",
            "Keys: KEY=VALUE. A recipe beats the groups, and the command line beats the recipe.",
            "  python train.py --cfg job                                    every key with its value, as YAML",
            "  python train.py recipe=galore_60m trainer.batch_size=64      another value",
            "  python train.py strategy=fira                                another method on the same recipe",
            "  python train.py strategy=fira strategy/subspace=dct          another part on one axis",
            "  python train.py -m optim.lr=3e-3,6e-3 seed=1,2               a sweep, one run folder each",
            "",
            "Exit codes: 0 done, 1 failure, 2 something written wrong, 3 out of memory, 4 loss not finite,",
            "5 disk full, 130 interrupted, 143 terminated. HYDRA_FULL_ERROR=1 shows tracebacks.",
        ]
    )
