"""Rules about reparametrised weights: what their rank, their merges and the schedule need of each other."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_train.config.schema import Part, RunConfig
from lowrank_train.config.shapes import smallest_side

THINNED = ("zero", "random", "magnitude")
TASKS_THAT_TRAIN = ("train", "plan")  # a plan is of a run that would be refused otherwise


def weights_faults(config: RunConfig) -> Iterator[str]:
    """What cannot be trained as it is written."""
    strategy = config.strategy
    if strategy.weights is None:
        if strategy.merge is not None:
            yield "strategy.merge: has no layers to fold; choose strategy/weights=lora, or drop it with ~strategy.merge"
        return
    rank = strategy.weights.get("rank")
    patterns = [f"{pattern}.weight" if not pattern.endswith("*") else pattern for pattern in _modules(strategy.weights)]
    smallest = smallest_side(config, patterns)
    if isinstance(rank, int) and smallest is not None and rank > smallest[0]:
        yield (
            f"strategy.weights.rank={rank}: is above {smallest[0]}, the short side of {smallest[1]} "
            f"({smallest[2][0]} x {smallest[2][1]}) in model {config.model.name}"
        )
    if config.model.tie_word_embeddings and "*" in _modules(strategy.weights):
        yield "strategy.weights.modules=[*]: takes in the head, which shares the embedding's matrix; name the modules"
    heads, rows = strategy.weights.get("heads"), config.trainer.batch_size
    if config.task in TASKS_THAT_TRAIN and isinstance(heads, int) and heads > 0 and rows % heads:
        yield (
            f"trainer.batch_size={rows}: cannot be cut into equal parts for strategy.weights.heads={heads}; use a "
            f"multiple of {heads}, such as {(rows // heads + 1) * heads}"
        )
    devices = config.trainer.devices * config.trainer.num_nodes
    if (
        config.task in TASKS_THAT_TRAIN
        and strategy.weights.get("across_ranks")
        and devices > 1
        and config.optim.grad_clip
    ):
        yield (
            f"optim.grad_clip={config.optim.grad_clip:g}: with strategy.weights.across_ranks=true each device has "
            "gradients of its own, whose norm would clip what all share differently on each; use optim.grad_clip=null"
        )
    if strategy.merge is not None and config.task in TASKS_THAT_TRAIN:
        yield from _merge(config, strategy.merge)


def _modules(weights: Part) -> list[str]:
    return list(weights.get("modules") or [])


def _merge(config: RunConfig, merge: Part) -> Iterator[str]:
    every, steps, cycle = merge.get("every"), config.trainer.steps, config.optim.cycle_steps
    if not isinstance(every, int) or every < 1:  # the part says so itself
        return
    if every > steps:
        yield f"strategy.merge.every={every}: no merge would come in trainer.steps={steps} updates; use a smaller one"
    if cycle is not None and every % cycle and cycle % every:
        yield (
            f"strategy.merge.every={every}: merges and the restarts of optim.cycle_steps={cycle} would drift apart; "
            f"make one divide the other, such as strategy.merge.every={cycle}"
        )
    delay = merge.get("delay", 0)
    if isinstance(delay, int) and not 0 <= delay < every:
        yield f"strategy.merge.delay={delay}: must lie in [0, {every}), the updates from one merge to the next"


def weights_remarks(config: RunConfig) -> Iterator[str]:
    """What can be trained, but rarely is meant."""
    merge, schedule = config.strategy.merge, config.optim.schedule
    every, steps = (merge or {}).get("every"), config.trainer.steps
    if (config.strategy.weights or {}).get("init") == "zero":
        until = "ever" if merge is None else f"before the first merge, which comes after {every} updates"
        yield (
            "strategy.weights.init=zero: A and B are both zero, so that neither has a gradient and no matrix of "
            f"strategy.weights.modules learns {until}; use strategy.weights.init=kaiming, unless a run of the "
            "published ReLoRA is to be repeated"
        )
    if isinstance(every, int) and steps % every:
        lower = steps // every * every
        yield (
            f"strategy.merge.every={every} does not divide trainer.steps={steps}, so that the last round is short: "
            f"{steps - lower} updates; use another, or trainer.steps={lower} or {lower + every}"
        )
    if merge is not None and merge.get("moments") in THINNED and schedule != "cosine_restarts":
        yield (
            f"strategy.merge.moments={merge['moments']} takes moments away but not their step count, so that the "
            f"updates after a merge are several times too large, and optim.schedule={schedule} does not warm up again; "
            f"use optim=cosine_restarts optim.cycle_steps={merge.get('every')}, or strategy.merge.moments=fresh"
        )
    yield from _phases(config, config.strategy.weights or {})


def _phases(config: RunConfig, weights: Part) -> Iterator[str]:
    """Phases of a representation that end after the run, or that the schedule does not follow."""
    guided, steps = weights.get("guided_steps"), config.trainer.steps
    if isinstance(guided, int) and guided > steps:
        yield (
            f"strategy.weights.guided_steps={guided} is more than trainer.steps={steps}, so that the dense path is "
            "still there at the end and the weights are no product of the factors; use at most half of the updates"
        )
    iteration, cycle = weights.get("iteration_steps"), config.optim.cycle_steps
    if isinstance(iteration, int) and iteration > 0 and cycle and cycle % iteration:
        yield (
            f"strategy.weights.iteration_steps={iteration}: the restarts of optim.cycle_steps={cycle} would not meet "
            f"new samples of columns; use optim.cycle_steps={iteration}"
        )
