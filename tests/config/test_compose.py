"""Composition: what wins over what, values and their types, and the surface of keys."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_train.config import RunConfig, compose, load, save, to_container
from lowrank_train.config.validate import known_keys

Faults = Callable[..., list[str]]
KEYS = Path(__file__).with_name("keys.txt")


def test_default_run_is_the_default_recipe() -> None:
    config = compose([])
    assert (config.model.name, config.strategy.name, config.data.name) == ("llama_1m", "galore", "shakespeare")
    assert config.run_name == "llama_1m-galore-shakespeare"
    assert all(Path(path).is_file() for path in [*config.data.train, *config.data.validation, config.data.tokenizer])


def test_recipe_beats_groups_and_command_line_beats_recipe() -> None:
    assert compose(["recipe=galore_60m"]).optim.warmup_steps == 1000
    assert compose(["recipe=galore_60m", "optim=linear"]).optim.warmup_steps == 1000
    assert compose(["recipe=galore_60m", "optim=linear"]).optim.schedule == "linear"
    assert compose(["recipe=galore_60m", "optim.warmup_steps=7"]).optim.warmup_steps == 7
    assert compose(["recipe=galore_60m", "precision=fp32"]).precision.weights == "float32"
    assert compose(["recipe=galore_60m", "model=llama_130m"]).model.hidden_size == 768


def test_parts_are_chosen_axis_by_axis() -> None:
    strategy = compose(["strategy/subspace=randomized", "strategy.subspace.iterations=2"]).strategy
    assert strategy.subspace is not None
    assert strategy.subspace["_target_"].endswith("Randomized")
    assert strategy.subspace["iterations"] == 2
    assert strategy.subspace["rank"] == compose([]).strategy.subspace["rank"]  # type: ignore[index]


def test_strategy_without_the_axis_gets_it() -> None:
    words = ["strategy=full", "strategy/inner=adam", "strategy/lift=backproject", "strategy/subspace=svd"]
    strategy = compose([*words, "strategy.select=['*.mlp.*.weight']"]).strategy
    assert strategy.lift is not None
    assert strategy.lift["scale"] == 0.25


@pytest.mark.parametrize(
    "word, value",
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1", 1.0),
        ("trainer.steps=1e4", 10_000),
        ("optim.grad_clip=null", None),
        ("data.repeat=false", False),
        ("data.train=[a,b]", ["a", "b"]),
        ("run_name=0042", "0042"),
        ("run_name=true", "true"),
        ("generate.prompt=It's 5, or [not]", "It's 5, or [not]"),
        ("generate.prompt='quoted, words'", "quoted, words"),
        ("generate.prompt='Tis nobler", "'Tis nobler"),
        ("generate.prompt=", ""),
        ("resume=false", "false"),
        ("out=a=b", "a=b"),
        ("strategy.rest.betas=[0.9,0.95]", (0.9, 0.95)),
        ("strategy.subspace.side=left", "left"),
        ("++optim.lr=0.5", 0.5),
        ("+trainer.threads=2", 2),
        ("run_name='${model.name}-x'", "llama_1m-x"),
    ],
)
def test_values_take_the_type_of_their_key(word: str, value: Any) -> None:
    node: Any = compose([word])
    for name in word.partition("=")[0].lstrip("+").split("."):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    "word, rule",
    [
        ("optim.lr=fast", "must be a number"),
        ("optim.lr=true", "must be a number"),
        ("optim.lr=null", "must be a number"),
        ("trainer.steps=1.5", "must be a whole number"),
        ("trainer.steps='10'", "must be a whole number"),
        ("data.repeat=yes", "must be true or false"),
        ("data.repeat=1", "must be true or false"),
        ("optim.grad_clip=None", "for no value write null"),
        ("data.train=a.txt", "must be a list, [...], each text"),
        ("data.packing=pa", "must be one of pad | concat | whole. Did you mean pad?"),
        ("task=trainn", "Did you mean train?"),
        ("strategy.rest.betas=[0.9]", "must be a list of 2"),
        ("strategy.subspace.side=lef", "Did you mean left?"),
        ("strategy.subspace.rank=big", "must be a whole number"),
        ("strategy.subspace=svd", "write strategy/subspace=svd"),
        ("optim=0.1", "There are: constant, cosine, cosine_restarts, linear"),
        ("optim.lr=[1,", "not a value that can be read"),
        ("optim.lr=1,2", "add -m"),
        ("strategy=galore,full", "add -m"),
        ("hydra.verbose=true", "add -m"),
        ("--lr=1e-3", "optim.lr=1e-3"),
        ("optim.lr", "is not KEY=VALUE"),
        ("~optim.lrr", "Did you mean ~optim.lr?"),
        ("optim.lr='${nothing.there}'", "nothing.there"),
    ],
)
def test_wrong_values_are_refused_with_the_rule(word: str, rule: str, faults: Faults) -> None:
    found = faults(word)
    assert len(found) == 1
    assert rule in found[0]


def test_a_flag_with_a_value_is_one_fault(faults: Faults) -> None:
    assert len(faults("--learning-rate", "1e-3")) == 1
    assert "optim.lr=VALUE" in faults("--learning-rate", "1e-3")[0]


def test_saved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = compose(["recipe=galore_60m", "generate.prompt=a: 'b' # ü", "optim.lr=1e-5"])
    save(config, tmp_path / "config.yaml")
    assert to_container(load(tmp_path / "config.yaml")) == to_container(config)


def test_container_is_plain() -> None:
    def kinds(node: Any) -> set[type]:
        if isinstance(node, dict):
            return {dict}.union(*(kinds(value) for value in node.values()))
        return {list}.union(*(kinds(value) for value in node)) if isinstance(node, list) else {type(node)}

    assert kinds(to_container(compose([]))) <= {dict, list, str, int, float, bool, type(None)}


def test_keys_are_frozen() -> None:
    """A key that comes, goes or changes its name shows here: rewrite keys.txt on purpose, and say so."""
    keys = known_keys(to_container(compose([])))
    assert "\n".join(keys) + "\n" == KEYS.read_text(encoding="utf-8")


def test_schema_defaults_are_those_of_the_groups() -> None:
    """The YAML repeats a default for its reader; it must not come to say something else."""
    schema = dataclasses.asdict(RunConfig())
    composed = to_container(compose(["~recipe"]))
    for group in ("optim", "trainer", "logger", "precision"):
        assert composed[group] == schema[group]


def test_composing_is_quick_and_light() -> None:
    """Refusals come within two seconds of CPU time, and no heavy library is imported for them."""
    code = (
        "import sys, time\nfrom lowrank_train.cli import main\n"
        "code = main(['recipe=galore_60m', 'optim.lrr=1', '--cfg', 'job'])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert time.process_time() < 2\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Did you mean optim.lr?" in done.stderr


def test_no_recipe_and_no_lift_are_words_one_may_say() -> None:
    """recipe=null leaves the groups alone; deleting what a strategy does without anyway is no fault."""
    assert compose(["recipe=null", "trainer.steps=7"]).trainer.steps == 7
    assert compose(["strategy=full", "~strategy.subspace", "~strategy.lift"]).strategy.lift is None


def test_what_is_composed_is_nobody_elses_and_as_new_as_its_files(own_yaml: Path) -> None:
    """Trees are kept between calls: no change of one configuration, and no old file, may come out of another call."""
    words = ["recipe=galore_60m", "strategy=fira"]
    first = compose(words)
    assert first.strategy.lift is not None and first.strategy.subspace is not None
    first.strategy.lift["form"] = "changed"
    first.strategy.select.clear()
    assert first.strategy != compose(words).strategy == compose(words).strategy
    for folder, name, text, new in (
        ("conf/optim", "cosine", "lr: ", "lr: 7 #"),
        ("conf/strategy", "fira", "name: fira", "name: mine"),
        ("conf/strategy/lift", "scaled_residual", "scale: ", "scale: 9 #"),
        ("recipes", "galore_60m", "rank: 128", "rank: 96"),
        ("recipes", "galore_60m", "  lr: 0.01", "# lr: 0.01"),
    ):
        path = own_yaml / folder / f"{name}.yaml"
        before = path.read_text()
        assert text in before
        path.write_text(before.replace(text, new, 1))
        compose(words)
    config = compose(words)
    assert config.strategy.lift is not None and config.strategy.subspace is not None
    assert (config.optim.lr, config.strategy.name, config.strategy.lift["scale"]) == (7, "mine", 9)
    assert config.strategy.subspace["rank"] == 96
