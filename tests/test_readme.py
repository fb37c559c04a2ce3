"""The README tells the truth: its tree is the real tree, its commands compose, its links and keys exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.config.files import save
from lowrank_train.config.schema import RunConfig
from lowrank_train.verbs import TAKE_FOLDERS, split_verb, with_folders

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
LISTED_FILE_BY_FILE = ("lowrank_train", "benchmarks", "data", "docs")  # the other folders have a line each
NOT_LISTED = ("*.egg-info", "__pycache__", "__init__.py", "runs", "results", "build", "dist")


def code_blocks() -> list[str]:
    """The insides of the fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text between a heading and the next one."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def listed_tree() -> Iterator[tuple[str, str]]:
    """Path and description of every line of the tree; two spaces of indent a level, folders end in a slash."""
    [block] = re.findall(r"```text\n(.*?)```", TREE, flags=re.DOTALL)
    above: list[str] = []
    for line in block.splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()  # type: ignore[union-attr]
        above[len(indent) // 2 :] = [name]
        yield "".join(above), description


def real_files() -> Iterator[str]:
    """The files that must each have a line: those at the root and those in the folders listed file by file."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if parts[0].startswith(".") or any(Path(part).match(pattern) for part in parts for pattern in NOT_LISTED):
            continue
        if path.is_file() and (len(parts) == 1 or parts[0] in LISTED_FILE_BY_FILE):
            yield "/".join(parts)


def test_tree_is_the_real_one() -> None:
    listed = dict(listed_tree())
    assert set(real_files()) - set(listed) == set(), "files without a line in docs/tree.md"
    assert [path for path in listed if not (ROOT / path).exists()] == [], "lines for what does not exist"
    assert [path for path in listed if path.endswith("/") != (ROOT / path).is_dir()] == []
    assert [path for path, description in listed.items() if not description] == [], "lines that say nothing"


def commands() -> list[str]:
    """Every `python train.py ...` and `lowrank ...` line of the code blocks, continuation lines joined."""
    lines = (line.strip() for block in code_blocks() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if re.match(r"(python train\.py|lowrank)\b", line) and "NAME" not in line]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_command_composes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    verb, words = split_verb(words[2:] if words[0] == "python" else words[1:])
    if verb in ("recipes", "help"):
        assert main([verb]) == 0
        return
    words = [word for word in words if word not in ("-m", "--cfg", "job")]
    if "-m" in command.split():
        words = [
            word for word in words if not word.startswith(("hydra.", "launcher="))
        ]  # of the sweep, not of its jobs
        words = [re.sub(r"=([^,]+),.*", r"=\1", word) for word in words]  # the first of the swept values
    if verb in TAKE_FOLDERS:
        words = with_folders(words)
    if verb == "plan":  # of all of them, it composes each
        words = ["strategy=full" if word == "strategy=all" else word for word in words]
    if verb is not None:
        words.append(f"task={verb.replace(' ', '_')}")
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.startswith("run="):  # what the reader has by then
            folder = tmp_path / word.removeprefix("run=")
            folder.mkdir(parents=True)
            save(compose([]), folder / "config.yaml")
    assert isinstance(compose(words), RunConfig)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_glossary_names_real_keys() -> None:
    rows = re.findall(r"^\| .* \| .* \|$", section("Glossary"), flags=re.MULTILINE)[1:]
    keys = [key for row in rows for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", row.split("|")[2])]
    assert len(keys) >= 8
    assert [key for key in keys if not is_key(key)] == []


def is_key(dotted: str) -> bool:
    """Whether a dotted name is a key of the configuration; the keys of a part are those of its YAML files."""
    node: type = RunConfig
    names = dotted.split(".")
    for depth, name in enumerate(names):
        if name not in {entry.name for entry in fields(node)}:
            return False
        node = get_type_hints(node)[name]
        if not is_dataclass(node):
            rest = names[depth + 1 :]
            files = (ROOT / "conf" / "/".join(names[: depth + 1])).glob("*.yaml")
            return not rest or any(rest[0] in yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    return True


def test_the_page_of_results_is_made_from_the_rows() -> None:
    """No figure in it is typed; `python -m benchmarks.results_page` writes it anew."""
    from benchmarks.results_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_plan_on_the_page_is_that_of_the_command() -> None:
    """`python -m benchmarks.plan_page` writes both; tests/memory compares them with the command."""
    from benchmarks.plan_page import BEGINS, ENDS, PAGE, block

    assert README.partition(BEGINS)[2].partition(ENDS)[0] == block(PAGE.read_text(encoding="utf-8"))
