"""Parts are read off their source: arguments, inherited ones, aliases of types; nothing of them is imported."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from lowrank_train.config import UserError, instantiate
from lowrank_train.config.parts import Argument, NoSuchPart, arguments_of, module_tree, part_faults

Faults = Callable[..., list[str]]

BASE = """
    '''A base.'''
    from __future__ import annotations
    from dataclasses import dataclass
    from typing import ClassVar, Literal
    raise RuntimeError("must not be imported")
    Side = Literal["left", "right"]

    @dataclass
    class Base:
        rank: int
        side: Side = "left"
        kind: ClassVar[str] = "base"
"""
CHILD = """
    '''A child.'''
    from dataclasses import dataclass, field
    from ourparts.base import Base, Side

    class Plain:
        hidden: int = 3

    @dataclass
    class Child(Base, Plain):
        betas: tuple[float, float] = (0.9, 0.999)
        other: Side | None = None
        names: list[str] = field(default_factory=list)
        made: int = field(init=False, default=0)
        must: float = field(kw_only=True)

        def method(self) -> None:
            local: int = 3
"""


@pytest.fixture
def our_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "ourparts"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (package / "base.py").write_text(textwrap.dedent(BASE))
    (package / "child.py").write_text(textwrap.dedent(CHILD))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    arguments_of.cache_clear()
    module_tree.cache_clear()


@pytest.mark.usefixtures("our_parts")
def test_arguments_are_read_without_importing() -> None:
    side = Literal["left", "right"]
    assert arguments_of("ourparts.child.Child") == {
        "rank": Argument(int, required=True),
        "side": Argument(side, required=False),
        "betas": Argument(tuple[float, float], required=False),
        "other": Argument(side | None, required=False),
        "names": Argument(list[str], required=False),
        "must": Argument(float, required=True),
    }


@pytest.mark.usefixtures("our_parts")
def test_faults_of_a_part() -> None:
    part = {"_target_": "ourparts.child.Child", "side": "lef", "betas": [0.9], "nothing": 1, "must": 1}
    found = dict(part_faults("part", part))
    assert found.keys() == {f"part.{name}" for name in ("side", "betas", "nothing", "rank")}
    assert found["part.rank"] == "is required: a whole number"
    assert "Did you mean left?" in found["part.side"]
    assert isinstance(part["must"], float)


@pytest.mark.usefixtures("our_parts")
@pytest.mark.parametrize(
    "target, reason",
    [
        ("ourparts.child.Chld", "Did you mean ourparts.child.Child?"),
        ("ourparts.nothing.Child", "there is no module ourparts.nothing"),
        ("nopackage.at.All", "there is no module nopackage.at"),
        ("bare", "there is no module bare"),
    ],
)
def test_target_that_is_not_there(target: str, reason: str) -> None:
    with pytest.raises(NoSuchPart, match=reason.replace("?", r"\?")):
        arguments_of(target)


def test_wrong_target_is_a_fault_of_its_key(faults: Faults) -> None:
    words = "strategy.subspace._target_=lowrank_train.optim.subspace.svd.Svdd"
    assert any("Did you mean lowrank_train.optim.subspace.svd.Svd?" in fault for fault in faults(words))


@pytest.mark.parametrize(
    "word",
    [
        "strategy.lift._target_=lowrank_train.optim.subspace.svd.Svd",
        "strategy.subspace._target_=lowrank_train.optim.moments.Adam",
        "strategy.rest._target_=subprocess.Popen",
        "strategy.rest._target_=os.system",
        "strategy.rest._target_=3",
        "strategy.rest._target_=null",
    ],
)
def test_only_parts_of_an_axis_stand_on_it(word: str, faults: Faults) -> None:
    key, _, target = word.partition("=")
    assert any(fault.startswith(f"{key}={target} (command line): ") for fault in faults(word))


def test_real_parts_are_built_with_what_they_were_given() -> None:
    built = instantiate({"_target_": "lowrank_train.optim.moments.Adam", "betas": [0.8, 0.9], "eps": 1})
    assert (built.betas, built.eps) == ((0.8, 0.9), 1.0)
    assert isinstance(built.betas, tuple)
    with pytest.raises(UserError, match="no such key"):
        instantiate({"_target_": "lowrank_train.optim.moments.Adam", "betass": 1})
