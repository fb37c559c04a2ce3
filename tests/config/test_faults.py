"""A slip anywhere is refused with the key, where it was written, and what was meant; all slips at once."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_train.cli import main
from lowrank_train.config import UserError, compose
from lowrank_train.config.suggest import OTHER_WORDS, distance
from lowrank_train.config.validate import build, known_keys

Faults = Callable[..., list[str]]
KEYS = Path(__file__).with_name("keys.txt").read_text(encoding="utf-8").split()
GROUPS = {"model", "data", "strategy", "precision", "optim", "trainer", "logger"}


def mutations(name: str) -> list[str]:
    """One letter too many, one replaced, one missing, two swapped; at a place that depends on the name alone."""
    place = len(name) // 2
    swapped = name[: place - 1] + name[place] + name[place - 1] + name[place + 1 :]
    replaced = name[:place] + ("x" if name[place] != "x" else "q") + name[place + 1 :]
    found = [name[:place] + "z" + name[place:], replaced, name[:place] + name[place + 1 :], swapped]
    return [word for word in dict.fromkeys(found) if word and word != name]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_misspelt_is_refused_with_the_right_suggestion(key: str) -> None:
    """The tree is checked as `compose` does, without composing it anew for each of some three hundred slips."""
    parent, _, name = key.rpartition(".")
    for slip in mutations(name):
        wrong = f"{parent}.{slip}" if parent else slip
        if wrong in KEYS:
            continue
        tree = TREE.copy()
        node = tree
        for word in parent.split(".") if parent else ():
            node[word] = dict(node[word])  # type: ignore[call-overload]
            node = node[word]  # type: ignore[assignment]
        node[slip] = None
        _, found = build(tree)
        rivals = {k for k in KEYS if k.rpartition(".")[0] == parent and distance(slip, k.rpartition(".")[2]) <= 1}
        assert len(found) == 1
        assert found[0].key == wrong
        assert any(f"Did you mean {rival}?" in found[0].rule for rival in rivals | {key}), found[0].rule


def _tree() -> dict[str, object]:
    from lowrank_train.config import to_container

    return to_container(compose([]))


TREE = _tree()


@pytest.mark.parametrize("key", ["optim.lr", "strategy.subspace.rank", "seed", "trainer.steps", "data.seq_len"])
def test_misspelt_key_on_the_command_line_exits_2(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{key}x=1", "--cfg", "job"]) == 2
    captured = capsys.readouterr()
    assert f"- {key}x (command line): there is no such key. Did you mean {key}?" in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


@pytest.mark.parametrize("group", sorted([*GROUPS, "recipe", "strategy/subspace"]))
def test_misspelt_group_or_choice(group: str, faults: Faults) -> None:
    choices = {"recipe": "galore_60", "strategy": "galor", "strategy/subspace": "svdd", "model": "llama_60"}
    choice = choices.get(group, "nonesuch")
    (found,) = faults(f"{group}={choice}")
    assert found.startswith(f"{group}={choice}: there is no such choice. ")
    assert ("Did you mean" in found) == (choice != "nonesuch")
    assert "There are: " in found
    assert faults(f"{group[:-1]}{group[-1]}s=x")


def test_misspelt_nested_group(faults: Faults) -> None:
    assert faults("strategy/subspaces=svd") == [
        "strategy/subspaces: there is no such group. Did you mean strategy/subspace?"
    ]


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("lr", "optim.lr"),
        ("rank", "strategy.subspace.rank"),
        ("strategy.rank", "strategy.subspace.rank"),
        ("batch_size", "trainer.batch_size"),
        ("trainer.lr", "optim.lr"),
        ("trainer.seq_len", "data.seq_len"),
        ("modeel.hidden_size", "model.hidden_size"),
        ("model.hiden_size", "model.hidden_size"),
        ("strategy.subspase.rank", "strategy.subspace.rank"),
        *OTHER_WORDS.items(),
    ],
)
def test_key_at_another_level_and_the_words_of_the_papers(wrong: str, right: str, faults: Faults) -> None:
    assert f"{wrong} (command line): there is no such key. Did you mean {right}?" in faults(f"{wrong}=1")


def test_words_of_the_papers_lead_to_keys_that_exist() -> None:
    assert set(OTHER_WORDS.values()) <= {*KEYS, *GROUPS, "recipe"}
    assert not set(OTHER_WORDS) & {key for key in KEYS if "." not in key}


def test_slips_in_a_recipe_and_in_a_group_file_are_found_with_their_lines(own_yaml: Path, faults: Faults) -> None:
    recipe = own_yaml / "recipes" / "galore_60m.yaml"
    recipe.write_text(recipe.read_text().replace("warmup_steps:", "warmup_step:").replace("rank: 128", "rank: many"))
    optim = own_yaml / "conf" / "optim" / "cosine.yaml"
    optim.write_text(optim.read_text().replace("schedule: cosine", "schedule: cosin"))
    basis = own_yaml / "conf" / "strategy" / "subspace" / "randomized.yaml"
    basis.write_text(basis.read_text().replace("stagger:", "stager:"))
    found = faults("recipe=galore_60m", "optim.lr=fast", "seeed=3")
    assert len(found) == 6

    def line(path: Path, text: str) -> str:
        number = next(i for i, row in enumerate(path.read_text().splitlines(), 1) if text in row)
        return f"({path.relative_to(own_yaml)}, line {number})"

    assert (
        f"optim.warmup_step {line(recipe, 'warmup_step:')}: there is no such key. Did you mean optim.warmup_steps?"
        in found
    )
    assert f"strategy.subspace.rank=many {line(recipe, 'rank: many')}: must be a whole number or null" in found
    assert any(
        fault.startswith(f"optim.schedule=cosin {line(optim, 'schedule: cosin')}: must be one of") for fault in found
    )
    assert any(fault.startswith(f"strategy.subspace.stager {line(basis, 'stager:')}") for fault in found)
    assert "optim.lr=fast (command line): must be a number" in found
    assert any(fault.startswith("seeed (command line)") for fault in found)


def test_wrong_choice_in_a_recipe_does_not_hide_other_slips(own_yaml: Path, faults: Faults) -> None:
    recipe = own_yaml / "recipes" / "galore_60m.yaml"
    recipe.write_text(
        recipe.read_text().replace("/strategy: galore", "/strategy: galor").replace("  steps:", "  stepz:")
    )
    found = faults("recipe=galore_60m", "modlee.name=x")
    (choice,) = [fault for fault in found if fault.startswith("strategy=galor (recipes/galore_60m.yaml, line ")]
    assert "there is no such choice. Did you mean galore?" in choice
    assert any(fault.startswith("trainer.stepz (recipes/galore_60m.yaml, line ") for fault in found)
    assert any(fault.startswith("modlee.name (command line)") for fault in found)


def test_broken_yaml_is_named_with_its_line(own_yaml: Path, faults: Faults) -> None:
    (own_yaml / "recipes" / "broken.yaml").write_text("a: 1\nb: [1,\n")
    (own_yaml / "recipes" / "empty.yaml").write_text("# nothing\n")
    (own_yaml / "recipes" / "listed.yaml").write_text("- a\n")
    assert faults() == []  # those who do not choose it are not troubled
    assert "recipes/broken.yaml, line 3: not valid YAML" in faults("recipe=broken")[0]
    assert faults("recipe=listed") == ["recipes/listed.yaml: holds no keys"]
    assert faults("recipe=empty") == []
    (own_yaml / "conf" / "optim" / "cosine.yaml").write_text("lr: 1\n  schedule: x\n")
    assert "conf/optim/cosine.yaml, line 2: not valid YAML" in faults()[0]


def test_recipe_may_build_on_another_and_lie_in_a_folder(own_yaml: Path, faults: Faults) -> None:
    folder = own_yaml / "recipes" / "mine"
    folder.mkdir()
    text = "# @package _global_\ndefaults:\n  - /recipe/galore_60m\n  - _self_\n\noptim:\n  lr: 0.02\n"
    (folder / "faster.yaml").write_text(text)
    config = compose(["recipe=mine/faster"])
    assert (config.optim.lr, config.optim.warmup_steps) == (0.02, 1000)
    (folder / "faster.yaml").write_text(text.replace("lr:", "lrr:"))
    (found,) = faults("recipe=mine/faster")
    assert found == "optim.lrr (recipes/mine/faster.yaml, line 7): there is no such key. Did you mean optim.lr?"


def test_every_fault_of_a_command_line_at_once(faults: Faults) -> None:
    words = ["recipe=galore_60", "strategy=galor", "optim.lrr=1", "trainer.steps=many", "--wandb", "~data.nothing"]
    assert len(faults(*words)) == len(words)


def test_rules_that_tie_keys_together_come_at_once(faults: Faults) -> None:
    assert len(faults("optim.lr=-1", "trainer.steps=0", "data.mask_documents=true", "data.packing=pad")) == 3


def test_no_two_letters_hide_a_distance() -> None:
    assert distance("lr", "rl") == 1
    assert distance("rank", "rnak") == 1
    assert distance("steps", "step") == 1
    assert distance("", string.ascii_lowercase) == 26


@pytest.mark.parametrize(
    "word",
    [
        *(
            "optim.lr.x=1",
            "data.train.x=1",
            "~data.train.0",
            "optim..lr=1",
            ".=1",
            "=1",
            "a[0]=1",
            "optim.=1",
            "~",
            "~=",
        ),
        *(
            "+",
            "++x",
            "-",
            "--",
            "-x=1",
            "",
            "\n",
            "é=1",
            "optim.lr=1#2",
            "a@b=1",
            "strategy@x=galore",
            "strategy.rest=3",
        ),
        *("strategy/inner@strategy.rest=adamw", "data.train={a:1}", "run_name=${", "out=${oc.env:NOT_SET_ANYWHERE}"),
        *("recipe=../conf", "recipe=", "resume=", "seed=1e400", "seed=99999999999999999999", "optim={lr:1}", "a b=1"),
    ],
)
def test_nonsense_is_a_fault_and_never_a_traceback(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "--cfg", "job"]) == 2
    assert capsys.readouterr().err.startswith("- ")


def test_full_error_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError):
        main(["lr=1"])


def test_known_keys_are_those_of_the_file() -> None:
    assert known_keys(TREE) == KEYS
