"""Every strategy of conf/ builds and steps in each moment it claims; every combination steps or says why not."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lowrank_train.config import UserError, compose, instantiate, paths
from lowrank_train.config.files import load_container
from lowrank_train.config.paths import group_choices
from lowrank_train.config.schema import ModelConfig, StrategyConfig
from lowrank_train.config.validate import build
from lowrank_train.models import meta_model
from lowrank_train.nn.reparam import dense_state_dict
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.published import METHODS
from lowrank_train.published.options import Options
from lowrank_train.strategy import Strategy

STRATEGIES = group_choices()["strategy"]
MOMENTS = ("after_backward", "project_in_backward", "in_backward")
SMALL = {
    "rank": 3, "every": 2, "head_dim": 4, "heads": 2, "r": 4, "init_r": 4, "target_r": 2, "num_vectors": 8,
    "vector_length": 4, "outer_rank": 6, "stages": 2,
}  # fmt: skip
TINY_MODEL = ["model=llama_9m", "model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=4",
              "model.num_hidden_layers=2"]  # fmt: skip


class Layer(nn.Module):
    """Attention and MLP in name and shapes: square, tall and wide matrices, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12, bias=False)
        self.self_attn = nn.ModuleDict({name: nn.Linear(12, 12, bias=False) for name in ("q_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(12, 20, bias=False), "down_proj": nn.Linear(20, 12, bias=False)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn["o_proj"](self.self_attn["q_proj"](self.norm(hidden)).tanh())
        return hidden + self.mlp["down_proj"](self.mlp["up_proj"](hidden).relu())


class Toy(nn.Module):
    """An embedding, two layers and a head, named as LLaMA's are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(17, 12), "layers": nn.ModuleList([Layer(), Layer()])})
        self.lm_head = nn.Linear(12, 17, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:  # type: ignore[union-attr]
            hidden = layer(hidden)
        logits: torch.Tensor = self.lm_head(hidden)
        return logits


@functools.cache
def configured(name: str) -> StrategyConfig:
    """As `compose` makes it, read here from its files and those of its parts: Hydra takes a tenth of a second each."""
    folder, parts = paths.CONF / "strategy", {}
    own = load_container(folder / f"{name}.yaml")
    for default in own.pop("defaults"):
        if default != "_self_":
            [(axis, choice)] = default.items()
            parts[axis] = load_container(folder / axis / f"{choice}.yaml")
    config, faults = build({"strategy": OmegaConf.to_container(OmegaConf.merge(parts, own))})
    assert config and not faults
    return config.strategy


@pytest.mark.parametrize("name", ["galore", "galore_8bit", "lisa", "relora", "frugal_sgd", "qlora", "library", "peft"])
def test_files_alone_are_what_is_composed(name: str) -> None:
    assert configured(name) == compose([f"strategy={name}", "recipe=null", "task=explain"]).strategy


@functools.cache
def tiny_model() -> ModelConfig:
    return compose(TINY_MODEL).model


def small(config: StrategyConfig, **changes: Any) -> StrategyConfig:
    """The same strategy in numbers that fit the toy, so that it refreshes within three updates."""
    settings = {**vars(config), **changes}
    for axis in ("weights", "subspace", "blocks"):
        part = settings[axis]
        if part:
            known = {key: value for key, value in SMALL.items() if part.get(key) is not None and part[key] > value}
            settings[axis] = {**part, **known}
    return StrategyConfig(**settings)


def updated(config: StrategyConfig, when: str, updates: int = 3) -> tuple[Toy, Toy]:
    """The toy before and after some real updates."""
    torch.manual_seed(0)
    before, model = Toy(), Toy()
    model.load_state_dict(before.state_dict())
    config.when = when  # type: ignore[assignment]
    strategy = Strategy.from_config(config, seed=1)
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=1e-2)
    for update in range(updates):
        tokens = torch.randint(17, (4, 8), generator=torch.Generator().manual_seed(update))

        def closure(tokens: torch.Tensor = tokens) -> torch.Tensor:
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)
    return before, model


@pytest.mark.parametrize("name", STRATEGIES)
def test_head_gives_paper_formula_and_parts(name: str) -> None:
    text = (paths.CONF / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
    head = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    if name not in ("sgd", "library"):  # which are nobody's paper
        assert re.search(r"arXiv \d{4}\.\d{5}|Jordan", "\n".join(head))
    assert any("<-" in line for line in head) or name == "library", "the update"
    assert any(line.startswith("# Parts: ") for line in head)
    assert load_container(paths.CONF / "strategy" / f"{name}.yaml")["name"] == name


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_builds_on_a_llama(name: str) -> None:
    model = meta_model(tiny_model(), vocab_size=64)
    strategy = Strategy.from_config(small(configured(name)))
    strategy.prepare(model)
    strategy.optimizer(model, lr=1e-3).initialize()
    rows = strategy.assignment(model)
    assert {row.name for row in rows} == {parameter for parameter, _ in model.named_parameters()}
    projected = [row for row in rows if row.role == "projected"]
    assert bool(projected) == (configured(name).subspace is not None)
    assert all("embed" not in row.name and "head" not in row.name for row in projected)


@pytest.mark.parametrize("when", MOMENTS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_three_updates_in_every_moment_or_a_reason(name: str, when: str) -> None:
    """What a file offers beside `when:` works; what it does not offer is refused, or has nothing to project."""
    text = (paths.CONF / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
    offered = re.search(r"^when: .*", text, flags=re.MULTILINE)
    assert offered
    if when not in offered[0]:
        if configured(name).subspace is None or configured(name).feedback:
            return  # refused by the checks of the configuration, under accumulation or altogether
        with pytest.raises(UserError, match=f"when={when}"):
            updated(small(configured(name)), when)
        return
    before, after = updated(small(configured(name)), when)
    assert all(param.isfinite().all() for param in after.parameters())
    dense = dense_state_dict(after)
    assert any(not torch.equal(dense[name], old) for name, old in before.state_dict().items())


DIFFER_ON_PURPOSE = {
    "frugal_block": "blocks in descending order, as the scripts of the paper's pre-training runs",
    "frugal_sgd": "Momentum, where published SGD also has dampening and coupled decay; alike without momentum",
    "galore_8bit": "the rest decays first, as torch does",
    "grass": "a share of the rows, where the library takes a rank",
    "library": "the library entry has no default class",
    "q_apollo": "Adam in 8 bits, measured as APOLLO does, where published code measures float32 corrected for bias",
    "q_galore": "the rest decays first, as torch does",
    "sgd": "with momentum, where the library's default has none",
    "trion": "a step scaled for AdamW's learning rate, where the library has the published one",
}
SAID_BY_SWITCHES = {
    "adam_atan2": ["strategy=full", "strategy/rest=adam_atan2"],
    "adam_mini": ["strategy=full", "strategy/rest=adam_mini"],
    "adamw": ["strategy=full"],
    "auon": ["strategy=muon", "strategy/inner=auon"],
    "frugal_coord_lion": ["strategy=frugal_coord", "strategy/inner=lion", "strategy/rest=lion"],
    "frugal_coord_sgd": ["strategy=frugal_coord", "strategy/inner=momentum", "strategy.inner.momentum=0"],
}
LIBRARY_ONLY = {"gradnormlorp"}


@pytest.mark.parametrize("name", sorted((set(METHODS) & set(STRATEGIES)) - set(DIFFER_ON_PURPOSE)))
def test_library_and_command_line_mean_the_same(name: str) -> None:
    """`lowrank_train.optimizer(NAME)` without options is strategy=NAME: the same parts with the same numbers."""
    config = configured(name)
    options = Options(name, {}, published=False)
    recipe = METHODS[name](options)
    strategy = Strategy.from_config(config)
    if isinstance(recipe.projected, InSubspace) and config.subspace is not None and config.subspace.get("rank"):
        recipe.projected.subspace.rank = config.subspace["rank"]  # the papers' ranks are those of their models
    assert strategy.selected is None or strategy.selected == recipe.projected
    assert strategy.rest == recipe.rest or config.freeze_rest


def test_every_method_of_the_library_is_a_strategy() -> None:
    assert set(METHODS) - set(STRATEGIES) <= set(SAID_BY_SWITCHES) | LIBRARY_ONLY
    assert set(DIFFER_ON_PURPOSE) <= set(METHODS) & set(STRATEGIES)
    for words in SAID_BY_SWITCHES.values():
        Strategy.from_config(compose([*words, "recipe=null", "task=explain"]).strategy)


@functools.cache
def parts(axis: str) -> dict[str, dict[str, Any]]:
    """Name -> part of every choice of an axis, small enough for the toy."""
    found = {}
    for choice in group_choices()[f"strategy/{axis}"]:
        part = load_container(paths.CONF / "strategy" / axis / f"{choice}.yaml")
        found[choice] = {**part, **{key: value for key, value in SMALL.items() if part.get(key) is not None}}
    return found


def refusal(config: StrategyConfig) -> str:
    """Why a strategy cannot be built for the toy; nothing where it can. No other exception will do."""
    try:
        Strategy.from_config(config).optimizer(Toy(), lr=1e-2).initialize()
    except ValueError as error:
        return str(error)
    return ""


def combinations() -> list[tuple[str, str]]:
    return list(itertools.product(group_choices()["strategy/subspace"], group_choices()["strategy/inner"]))


def ways(subspace: str, inner: str) -> list[tuple[str, str]]:
    """Every lift, and every on_refresh. They begin with another one for the next subspace or inner rule."""
    found = [*((lift, "keep") for lift in parts("lift")), ("backproject", "reset"), ("backproject", "rotate")]
    first = (list(parts("subspace")).index(subspace) + list(parts("inner")).index(inner)) % len(found)
    return found[first:] + found[:first]


@pytest.mark.parametrize("subspace, inner", combinations(), ids=map("-".join, combinations()))
def test_free_combinations_step_or_say_why_not(subspace: str, inner: str) -> None:
    """Any subspace, inner rule and lift: a reason at build, or three updates with finite weights.

    All are built; of those that can be, every pair takes two ways, and so nearly every two choices of two axes meet.
    """
    stepped = 0
    for lift, on_refresh in ways(subspace, inner):
        settings = {
            "subspace": parts("subspace")[subspace],
            "inner": parts("inner")[inner],
            "lift": parts("lift")[lift],
        }
        config = small(configured("galore"), **settings, on_refresh=on_refresh)
        if reason := refusal(config):
            assert len(reason) > 40, (lift, on_refresh, reason)
        elif stepped < 2:
            _, after = updated(config, "after_backward")
            assert all(param.isfinite().all() for param in after.parameters()), (lift, on_refresh)
            stepped += 1
    needs_moment = instantiate(parts("subspace")[subspace]).needs_state
    assert stepped or needs_moment or inner == "library", "nothing goes with this pair"


def test_a_whole_model_pattern_names_the_embedding_that_it_takes_in() -> None:
    config = configured("galore")
    for pattern, table in (("*.weight", "model.embed_tokens.weight, the embedding"), ("*", "the embedding")):
        with pytest.raises(UserError, match=re.escape(table)):
            Strategy.from_config(small(config, select=[pattern])).prepare(Toy())
    on_purpose = Strategy.from_config(small(config, select=["*_proj.weight", "*embed_tokens*"]))
    on_purpose.prepare(Toy())
    assert {row.name for row in on_purpose.assignment(Toy()) if row.role == "projected"} >= {
        "model.embed_tokens.weight"
    }
    head = meta_model(tiny_model(), vocab_size=64)
    with pytest.raises(UserError, match=r"lm_head\.weight, the head"):
        Strategy.from_config(small(config, select=["*_proj.weight", "lm*"])).prepare(head)
