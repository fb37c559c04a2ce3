"""card.html: everything a run is asked for later, from its folder alone, the same bytes each time."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowrank_train.cli import main
from lowrank_train.report.page import MOST_EVALUATIONS, evaluations, event_rows, memory_rows, result_rows
from lowrank_train.report.runs import Point, read_run
from tests.report.conftest import MakeRun, result_of

VOID = {"meta", "img"}


class Balanced(HTMLParser):
    """Collects the text, and fails on a tag that is closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_everything_and_is_well_formed(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("mine", "optim.lr=0.02")
    assert main(["card", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "card.html")
    html = (folder / "card.html").read_text(encoding="utf-8")
    reader = Balanced()
    reader.feed(html)
    assert reader.open == []
    for part in (
        "llama_1m · galore · shakespeare", "mine", "50.00", "48.00", "600.0 MiB", "40.0 MiB", "1,000", "0:01:20",
        "4.0 s, 5.0% of the run, 6 bases", "not known: no peak is known", "merge", "2 x, after updates 15 to 30",
        "c0ffee", "not committed", "da" * 32, "70" * 32, "A <fast> CPU x 1", "torch 2.13", "stopped and resumed",
        "optim.lr", "0.02", "To <b>be</b> & not", "strategy.subspace.rank", "2.9 KiB",
    ):  # fmt: skip
        assert part in reader.text, part
    assert "<b>be</b>" not in html, "what a model writes is text, not markup"
    assert (folder / "config.yaml").read_text(encoding="utf-8").strip() in reader.text
    [picture] = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(picture) == (folder / "loss.png").read_bytes()
    assert not re.search(r'(src|href)="(?!data:|config\.yaml)', html), "needs nothing beside it"


def test_the_page_is_rebuilt_to_the_byte_from_the_folder_alone(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("mine")
    assert main(["card", f"run={folder}"]) == 0
    first = {name: (folder / name).read_bytes() for name in ("card.html", "loss.png")}
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv", "result.json"):
        shutil.copy(folder / name, elsewhere / name)
    assert main(["card", str(elsewhere)]) == 0
    assert {name: (elsewhere / name).read_bytes() for name in first} == first


def test_what_moves_the_numbers_moves_the_page(make_run: MakeRun) -> None:
    pages = set()
    for number, changed in enumerate(({}, {"val_perplexity": 51.0}, {"commit": None}, {"planned": None})):
        folder = make_run(f"run{number}", "run_name=same", **changed)
        assert main(["card", str(folder)]) == 0
        pages.add((folder / "card.html").read_bytes())
    assert len(pages) == 4


def test_folders_without_a_finished_run_are_named_and_the_others_done(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, begun, poor = make_run("good"), make_run("begun", steps_done=7), make_run("poor")
    found = json.loads((poor / "result.json").read_text())
    del found["refreshes"]
    (poor / "result.json").write_text(json.dumps(found))
    assert main(["card", str(good), str(begun), str(poor), str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert "good/card.html" in out and (good / "card.html").exists()
    assert "begun: is not finished" in err and "poor: result.json lacks refreshes" in err and "is no folder" in err
    assert main(["card"]) == 2
    assert "lowrank card runs/NAME" in capsys.readouterr().err


def test_memory_is_told_apart_by_who_measured_it(make_run: MakeRun) -> None:
    run = read_run(make_run("mine"))
    result = result_of()
    assert "libraries included" in dict(memory_rows(run, result))["measured peak"]
    result["hardware"]["kind"] = "cuda"
    result["planned"]["complete"] = False
    rows = dict(memory_rows(run, result))
    assert "on the GPU" in rows["measured peak"] and "could not be followed" in rows["planned peak"]
    assert dict(memory_rows(run, result_of(planned=None)))["planned peak"] == "not planned"


def test_mfu_is_the_median_of_the_updates(make_run: MakeRun) -> None:
    folder = make_run("mine")
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("throughput/mfu")
    for number, share in zip((1, 2, 3, 4), (0.01, 0.4, 0.5, 0.6), strict=True):
        cells = lines[number].split(",")
        cells[column] = str(share)
        lines[number] = ",".join(cells)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    rows = dict(result_rows(read_run(folder), result_of(refreshes=0)))
    assert rows["MFU"] == "50.0%, median of the updates", "the first update warms up and is left out"
    assert rows["time in refreshes"] == "none: no basis moves"


def test_of_many_evaluations_some_are_shown_and_the_last(make_run: MakeRun) -> None:
    run = read_run(make_run("mine"))
    assert sum(line.startswith("<tr><td>") for line in evaluations(run)) == 4
    points = [Point(step, step, 1.0, 5.0, 5.0) for step in range(1, 102)]
    rows = [line for line in evaluations(type(run)(run.path, {}, [], points, None)) if line.startswith("<tr><td>")]
    assert len(rows) <= MOST_EVALUATIONS + 1
    assert rows[0].startswith("<tr><td>1<") and rows[-1].startswith("<tr><td>101<")
    assert list(evaluations(type(run)(run.path, {}, [], [], None))) == []
    assert dict(event_rows(run)) == dict.fromkeys(("merge", "reset"), "2 x, after updates 15 to 30")
