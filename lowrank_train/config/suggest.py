"""What did the user mean? Nearest names by edit distance, and the words of the papers and of other tools in ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OTHER_WORDS = {
    "accumulate_grad_batches": "trainer.total_batch_size",
    "activation_checkpointing": "model.activation_checkpointing",
    "alpha": "strategy.lift.scale",
    "block_size": "data.seq_len",
    "checkpoint": "resume",
    "ckpt_path": "resume",
    "clip": "optim.grad_clip",
    "continue_from": "resume",
    "cycle_length": "optim.cycle_steps",
    "dtype": "precision",
    "eval_every": "trainer.eval_every_steps",
    "experiment": "recipe",
    "galore_scale": "strategy.lift.scale",
    "gap": "strategy.subspace.every",
    "gpus": "trainer.devices",
    "grad_clipping": "optim.grad_clip",
    "gradient_accumulation": "trainer.total_batch_size",
    "gradient_accumulation_steps": "trainer.total_batch_size",
    "gradient_checkpointing": "model.activation_checkpointing",
    "gradient_clip_val": "optim.grad_clip",
    "layerwise": "strategy.when",
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "max_grad_norm": "optim.grad_clip",
    "max_length": "data.seq_len",
    "max_steps": "trainer.steps",
    "min_lr": "optim.min_lr_ratio",
    "model_config": "model",
    "model_name_or_path": "model.path",
    "num_training_steps": "trainer.steps",
    "num_nodes": "trainer.num_nodes",
    "optimizer": "strategy",
    "per_device_train_batch_size": "trainer.batch_size",
    "per_layer": "strategy.when",
    "proj_type": "strategy.subspace.side",
    "rank": "strategy.subspace.rank",
    "save_dir": "output_dir",
    "save_every": "trainer.save_every_steps",
    "scale": "strategy.lift.scale",
    "scheduler": "optim.schedule",
    "sequence_length": "data.seq_len",
    "update_gap": "strategy.subspace.every",
    "update_proj_gap": "strategy.subspace.every",
    "warmup": "optim.warmup_steps",
    "wd": "optim.weight_decay",
    "workers": "data.num_workers",
}


def distance(left: str, right: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that turn one word into the other."""
    before: list[int] = []
    previous = list(range(len(right) + 1))
    for row, left_letter in enumerate(left, 1):
        current = [row]
        for column, right_letter in enumerate(right, 1):
            cost = min(
                previous[column] + 1, current[column - 1] + 1, previous[column - 1] + (left_letter != right_letter)
            )
            if row > 1 and column > 1 and left_letter == right[column - 2] and left[row - 2] == right_letter:
                cost = min(cost, before[column - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]


def nearest(word: str, choices: Iterable[str], limit: int | None = None) -> str | None:
    """The choice closest to `word`, or None where none is close: a third of the letters may differ, at least one."""
    limit = max(1, len(word) // 3) if limit is None else limit
    word = word.lower()
    ranked = sorted((distance(word, choice.lower()), index, choice) for index, choice in enumerate(choices))
    if ranked and ranked[0][0] <= limit:
        return ranked[0][2]
    extended = [choice for _, _, choice in ranked if len(word) >= 3 and choice.lower().startswith(word)]
    return extended[0] if extended else None


def suggest_key(key: str, siblings: Sequence[str], known: Sequence[str]) -> str | None:
    """The dotted key that `key` was meant to be.

    `siblings`: names at the level where the first unknown word stands; `known`: every dotted key there is. A slip of
    one letter beats the same name at another level, which beats a word of the papers, which beats looser likenesses.
    """
    *parents, name = key.split(".")
    here = [".".join([*parents, sibling]) for sibling in siblings]
    close = nearest(name, siblings, limit=1)
    if close:
        return here[list(siblings).index(close)]
    elsewhere = [path for path in known if path.split(".")[-1] == name]
    if len(elsewhere) == 1:
        return elsewhere[0]
    if name.lower() in OTHER_WORDS:
        return OTHER_WORDS[name.lower()]
    if elsewhere:
        return " or ".join(elsewhere[:3])
    loose = nearest(name, siblings)
    if loose:
        return here[list(siblings).index(loose)]
    leaf = nearest(name, [path.split(".")[-1] for path in known])
    if leaf:
        return next(path for path in known if path.split(".")[-1] == leaf)
    other = nearest(name, OTHER_WORDS)
    return OTHER_WORDS[other] if other else None
