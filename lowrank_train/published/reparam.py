"""Reparametrised layers in anybody's own loop, under the option names of the published code."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from lowrank_train.config.errors import UserError
from lowrank_train.nn.merge import Merge
from lowrank_train.nn.reparam import Weights
from lowrank_train.optim.moments import Adam
from lowrank_train.published.options import Options, torch_adam
from lowrank_train.strategy import Strategy

CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora.LoRA", {}),
    "relora": ("lora.LoRA", {}),
    "pissa": ("lora.LoRA", {"init": "pissa"}),
    "olora": ("lora.LoRA", {"init": "olora"}),
    "lora_fa": ("lora.LoRA", {"train_a": False}),
    "dora": ("dora.DoRA", {}),
    "cola": ("lora.LoRA", {}),
    "mora": ("mora.MoRA", {}),
    "remora": ("mora.MoRA", {}),
    "lora_xs": ("three_factors.LoRAXS", {}),
    "lora_sb": ("lora_sb.LoRASB", {}),
    "curlora": ("three_factors.CURLoRA", {}),
    "svfit": ("three_factors.SVFit", {}),
    "sorsa": ("three_factors.SORSA", {}),
    "loldu": ("three_factors.LoLDU", {}),
    "allora": ("allora.ALLoRA", {}),
    "lamda": ("lamda.LaMDA", {}),
    "lora_ggpo": ("lora_ggpo.LoRAGGPO", {}),
    "moslora": ("between.MoSLoRA", {}),
    "sora": ("between.SoRA", {}),
    "melora": ("patterned_lora.MELoRA", {}),
    "capaboost": ("patterned_lora.CapaBoost", {}),
    "dylora": ("dylora.DyLoRA", {}),
    "nola": ("nola.NOLA", {}),
    "loha": ("loha.LoHa", {}),
    "fedpara": ("loha.FedPara", {}),
    "lte": ("parallel_heads.ParallelHeads", {}),
    "sltrain": ("sltrain.SLTrain", {}),
    "sst": ("sst.SST", {}),
    "int8": ("int8.Int8", {}),
    "lowrank": ("factorised.LowRank", {}),
    "block_dense": ("structured.BlockDense", {}),
    "block_shuffle": ("structured.BlockShuffle", {}),
    "cuttlefish": ("cuttlefish.Cuttlefish", {}),
    "dlrt": ("dlrt.DLRT", {}),
    "maestro": ("maestro.Maestro", {}),
    "slope": ("slope.SLoPe", {}),
    "trp": ("trp.TRP", {}),
    "peft": ("peft.Peft", {}),
}
"""Method -> the choice of representation under lowrank_train.nn, and what the method fixes of it."""

MOMENTS: dict[str, Literal["fresh", "keep"]] = {"cola": "fresh", "remora": "fresh", "lte": "keep"}
"""Methods that merge every `every` updates, and what becomes of the moments then; ReLoRA has more to choose."""

OTHER_NAMES = {
    "rank": ("r", "lora_r"),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "rslora": ("use_rslora",),
    "lr_ratio_b": ("loraplus_lr_ratio",),
    "sigma": ("ggpo_sigma",),
    "beta": ("ggpo_beta",),
    "trainable_scaling": ("scaling", "train_scaling"),
    "group": ("weight_group_size",),
    "modules": ("target_modules",),
}
"""Field of a choice -> what published code calls it."""

DEFAULT_MODULES = ("*attn*", "*attention*", "*mlp*")
"""Linear layers whose name says attention or MLP, as the published code picks them."""


def reparametrise(
    model: nn.Module,
    method: str,
    *,
    modules: Iterable[str] | None = None,
    published: bool = False,
    seed: int = 0,
    **options: Any,
) -> Strategy:
    """Swap the linear layers of any torch model in place; the strategy that goes with them, for one's own loop:

        strategy = lowrank_train.reparametrise(model, "relora", rank=128, alpha=32, relora=1000)
        optimizer = strategy.optimizer(model, lr=1e-3)     # or any torch optimizer over model.parameters()
        for step in range(1, steps + 1):
            ...                                            # forward, backward, optimizer.step()
            strategy.run_events(step, model, optimizer)    # what is due after this update, in strategy.events
        plain = strategy.dense_state_dict(model)           # loads into the model as it was

    modules: names of linear layers, or patterns; a name without a wildcard is also any module inside one of that name.
        None: attention and MLP, or every linear layer but the head where no name tells them apart.
    published: ReLoRA's published merges: one update later, moments thinned by a mask each, and an A of zeros; groups of
        int8 weights that leave 0 out.
    options: of the representation, of AdamW (betas, eps), and of merges, as published. ValueError for others.
    """
    if method not in CHOICES:
        nearest = difflib.get_close_matches(method, CHOICES, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else "."
        raise ValueError(f"there is no representation {method!r}{hint} There are: {', '.join(sorted(CHOICES))}")
    taken = Options(method, options, published)
    try:
        weights = weights_of(method, taken)
        weights.events()  # some cannot do without the length of the run
        merge = merge_of(method, taken)
        rule = torch_adam(taken)
    except ValueError as error:
        raise ValueError(library_words(error)) from None
    if modules is None:
        modules = taken.take("target_modules", None)
    weights.modules = patterns(model, modules)
    at_random = taken.take("stochastic_round", True) if method == "int8" else False
    taken.finish()
    strategy = strategy_of(method, weights, merge, rule, seed)
    strategy.rounding = "stochastic" if at_random else "nearest"
    try:
        strategy.prepare(model)
    except UserError as error:
        raise ValueError(library_words(error)) from None
    return strategy


def library_words(error: Exception) -> str:
    """A fault without the prefixes that keys have on the command line."""
    return str(error).replace("strategy.weights.", "").replace("strategy.merge.", "")


def strategy_of(name: str, weights: Weights, merge: Merge | None, rule: Adam, seed: int) -> Strategy:
    """One rule for all that is trained, stepping after the backward pass."""
    return Strategy(
        name=name,
        weights=weights,
        merge=merge,
        select=[],
        selected=None,
        rest=rule,
        freeze_rest=False,
        when="after_backward",
        basis_under_accumulation="window",
        state_dtype=None,
        seed=seed,
    )


def weights_of(method: str, options: Options) -> Weights:
    """The representation, each field under its own name or a published one."""
    path, fixed = CHOICES[method]
    module, _, name = path.rpartition(".")
    choice: type[Weights] = getattr(importlib.import_module(f"lowrank_train.nn.{module}"), name)
    given = dict(fixed)
    missing = object()
    for item in dataclasses.fields(choice):
        for alias in (item.name, *OTHER_NAMES.get(item.name, ())):
            value = options.take(alias, missing) if item.name != "modules" and item.name not in fixed else missing
            if value is not missing:
                given[item.name] = value
    if method == "relora":
        keeps = options.take("keep_original_weights", True)
        if not keeps or options.take("lora_only", False):
            raise ValueError("relora: merges need the original weights; use lowrank for a product alone")
        options.refuse("trainable_scaling", "is zeroed at a merge by the published code, and nothing is learnt after")
        options.refuse("quantize", "is a choice of storage here, not of the layer")
        if options.published:
            given.setdefault("init", "zero")
    if method == "int8":
        given.setdefault("published", options.published)
    if method == "peft":  # the rest is PEFT's to judge, but what the optimizer takes
        given["options"] = options.take_all(but=("betas", "eps", "target_modules"))
    return choice(**given)


def merge_of(method: str, options: Options) -> Merge | None:
    """ReLoRA's merges by the names of its script: relora, cycle_length and the kinds of reset; others' by `every`."""
    if method in MOMENTS:
        return Merge(every=options.take("every", Merge.every), moments=MOMENTS[method])
    if method != "relora":
        return None
    every = options.take("relora", None) or options.take("every", 5000)
    cycle = options.take("cycle_length", None) or options.take("cycle", None)
    magnitude = options.take("optimizer_magnitude_pruning", 0.0)
    random = options.take("optimizer_random_pruning", 0.0)
    kind = options.take("prune", None)  # with `ratio`: the two of them in one word and one number
    ratio = options.take("ratio", 0.0)
    if kind is not None:
        magnitude, random = (ratio if kind == word else 0.0 for word in ("magnitude", "random"))
    reset = options.take("reset_optimizer_on_relora", not (magnitude or random))
    if sum(bool(value) for value in (magnitude, random, reset)) != 1:
        raise ValueError(
            "relora takes exactly one of reset_optimizer_on_relora, optimizer_magnitude_pruning and "
            "optimizer_random_pruning"
        )
    return Merge(
        every=every,
        delay=1 if options.published else 0,
        moments="magnitude" if magnitude else "random",
        share=magnitude or random or 0.999,  # its reset is a random pruning that keeps one number in a thousand
        moments_every=cycle,
        independent_masks=options.published,
    )


def patterns(model: nn.Module, modules: Iterable[str] | None) -> list[str]:
    """Patterns of the names of linear layers, each of which matches one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if modules is None:
        found = [pattern for pattern in DEFAULT_MODULES if fnmatch.filter(names, pattern)]
        return found or names
    asked: list[str] = []
    for word in modules:
        inside = [word, f"*.{word}", f"{word}.*", f"*.{word}.*"] if not set(word) & set("*?[") else [word]
        asked += [pattern for pattern in inside if fnmatch.filter(names, pattern)] or [word]
    return asked
