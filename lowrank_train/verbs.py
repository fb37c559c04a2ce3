"""The verbs of the command line: what each does, which words call it, and the page that lists them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from lowrank_train.config.errors import UserError
from lowrank_train.config.paths import group_choices
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
        "support",
        "support",
        "lowrank_train.support_table:support",
        "what runs on several devices, and why the rest does not",
        "strategy=galore",
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


def with_task(words: list[str], verb: str) -> list[str]:
    """The words with the verb's task; UserError where they name another."""
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
            "5 disk full, 130 interrupted, 143 terminated, 138 stopped by Slurm's warning (and requeued).",
            "HYDRA_FULL_ERROR=1 shows tracebacks.",
        ]
    )
