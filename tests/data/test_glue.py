"""GLUE: the same rows from every form of file, what is refused, ids, and batches that resume exactly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data import Tokenizer, load_tokenizer
from lowrank_train.data.glue import TASKS, GlueBatches, GlueRow, GlueValidation, encode, glue_fingerprint, read_split
from lowrank_train.data.glue.encoding import NO_LABEL, EncodedRows
from tests.data.glue_files import examples, write_glue, write_tokenizer

OFFICIAL = {  # rows and, of classes, how many have each label; as the published files count them
    ("cola", "train"): (8551, [2528, 6023]),
    ("cola", "validation"): (1043, [322, 721]),
    ("sst2", "train"): (67349, [29780, 37569]),
    ("sst2", "validation"): (872, [428, 444]),
    ("mrpc", "train"): (3668, [1194, 2474]),
    ("mrpc", "validation"): (408, [129, 279]),
    ("stsb", "train"): (5749, None),
    ("stsb", "validation"): (1500, None),
    ("rte", "train"): (2490, [1249, 1241]),
    ("rte", "validation"): (277, [146, 131]),
    ("wnli", "train"): (635, [323, 312]),
    ("wnli", "validation"): (71, [40, 31]),
    ("qnli", "validation"): (5463, [2702, 2761]),
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("words"))))


def data_of(task: str, **keys: Any) -> DataConfig:
    return DataConfig(source="glue", task=task, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(TASKS))
def test_archive_json_lines_and_parquet_hold_the_same_rows(name: str, glue: Path, tmp_path: Path) -> None:
    task = TASKS[name]
    for split, seed in (("train", 0), *((split, number) for number, split in enumerate(task.validation, 1))):
        wanted = [GlueRow(texts, label) for texts, label in examples(task, 24 if split == "train" else 10, seed)]
        native = read_split(data_of(name, folder=str(glue)), split)
        assert native == wanted
        assert read_split(data_of(name, folder=str(glue / task.folder)), split) == wanted, "the task's own folder"
        records = [
            dict(zip(task.sentences, row.texts, strict=True)) | {"label": int(row.label) if task.labels else row.label}
            for row in wanted
        ]
        folder = tmp_path / "lines" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        lines = data_of(name, folder=str(tmp_path / "lines"))
        assert read_split(lines, split) == wanted
        assert glue_fingerprint(lines, native) == glue_fingerprint(lines, read_split(lines, split))


def test_parquet_as_on_the_hub(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    rows = examples(TASKS["mnli"], 6, 1)
    columns = {
        "premise": [t[0] for t, _ in rows],
        "hypothesis": [t[1] for t, _ in rows],
        "label": [int(n) for _, n in rows],
    }
    folder = tmp_path / "mnli"
    folder.mkdir()
    parquet.write_table(arrow.table(columns), folder / "validation_mismatched-00000-of-00001.parquet")
    found = read_split(data_of("mnli", folder=str(tmp_path)), "validation_mismatched")
    assert found == [GlueRow(texts, label) for texts, label in rows]


def test_labels_may_be_names_in_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"premise": "a", "hypothesis": "b", "label": "contradiction"}\n', encoding="utf-8")
    assert read_split(data_of("mnli", train=[str(file)]), "train") == [GlueRow(("a", "b"), 2.0)]


@pytest.mark.parametrize(
    ("task", "text", "told"),
    [
        ("mrpc", '{"sentence1": "a", "sentence2": "b", "label": 2}', "label=2: is no label of MRPC"),
        ("rte", '{"sentence1": "a", "sentence2": "b", "label": -1}', "labels are not public"),
        ("rte", '{"sentence1": "a", "sentence2": "b", "label": true}', "is no label of RTE"),
        ("rte", '{"sentence1": "a", "sentence2": "b", "label": "neutral"}', "0 or entailment, 1 or not_entailment"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": 5.5}', "is no score of STS-B"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": "nan"}', "is no score of STS-B"),
        ("qqp", '{"question1": "a", "label": 1}', "question1, question2, label, or"),
        ("sst2", '{"sentence": null, "label": 1}', "sentence is None, not a text"),
        ("sst2", '{"sentence": "a", "label": 1', "line 1: is not JSON"),
        ("sst2", "[1]", "line 1: holds no object"),
        ("sst2", "", "holds no row of SST-2"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(task: str, text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl") as refused:
        read_split(data_of(task, train=[str(file)]), "train")
    assert told in str(refused.value)


def test_what_is_not_there_is_named(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.folder=.*there is no such folder"):
        read_split(data_of("rte", folder=str(tmp_path / "nowhere")), "train")
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "test.tsv").write_text("index\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no file of the split validation \(found: test.tsv\).*dev.tsv"):
        read_split(data_of("rte", folder=str(tmp_path)), "validation")
    with pytest.raises(UserError, match=r"data.validation=.*did you mean .*dev.tsv"):
        read_split(data_of("rte", validation=[str(glue / "RTE" / "devv.tsv")]), "validation")
    with pytest.raises(UserError, match=r"mrpc/train-00000-of-00001.parquet of nyu-mll/glue is not in the cache"):
        read_split(data_of("mrpc", revision="0" * 40), "train")


def test_some_of_the_rows_are_the_same_some_for_every_seed(glue: Path) -> None:
    """In the order of the file, nested in one another, and of the training split alone."""
    folder = str(glue)
    whole, many, few = (read_split(data_of("rte", folder=folder, train_rows=count), "train") for count in (None, 16, 6))
    assert (len(whole), len(many), len(few)) == (24, 16, 6)
    places = [whole.index(row) for row in few]
    assert places == sorted(places) and set(few) < set(many) and places != list(range(6))
    assert len(read_split(data_of("rte", folder=folder, train_rows=6), "validation")) == 10
    with pytest.raises(UserError, match=r"data.train_rows=25: .* holds 24 rows"):
        read_split(data_of("rte", folder=folder, train_rows=25), "train")


def test_few_damaged_lines_are_left_out_and_many_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published QQP has a few lines that break off; a file of another kind breaks off everywhere."""
    good = "\n".join(f"{n}\ta\tb\tentailment" for n in range(200))
    file = tmp_path / "train.tsv"
    file.write_text(f"index\tsentence1\tsentence2\tlabel\n{good}\n7\tbroken\n", encoding="utf-8")
    assert len(read_split(data_of("rte", train=[str(file)]), "train")) == 200
    assert "left out 1 lines" in caplog.text and "line 202" in caplog.text
    file.write_text("index\tsentence1\tsentence2\tlabel\n0 a b entailment\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: .*separated by tabs"):
        read_split(data_of("rte", train=[str(file)]), "train")


def test_ids_are_those_of_the_library_and_padded_at_the_end(words: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    before = words.fingerprint
    rows = [GlueRow(("The river rose .", "The film"), 1.0), GlueRow(("The court", "The market fell on day 3 ."), 0.0)]
    encoded = encode(rows, words, seq_len=10, classes=True, split="train")
    del words._fingerprint
    assert words.fingerprint == before, "the tokenizer goes on cutting what it is given"
    library = words.to_hugging_face()
    for row, ids in zip(rows, encoded.ids, strict=True):
        assert ids.tolist() == library(*row.texts, truncation=True, max_length=10)["input_ids"]
    assert "1 of 2 rows are longer than data.seq_len=10" in caplog.text
    batch = encoded.batch([0, 1])
    assert batch["input_ids"].shape == (2, 10) and batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1] * 9 + [0], [1] * 10]
    assert batch["token_type_ids"][0].tolist() == [0] * 6 + [1] * 3 + [0]
    assert batch["input_ids"][0, 9] == words.pad_id and batch["num_tokens"] == 19


def test_a_tokenizer_without_marks_gets_a_line_break_between_texts(real_data: Path) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers/gpt2"))
    tokenizer.pad_id = tokenizer.eos_id
    ids = encode([GlueRow(("One.", "Two."), 0.0)], tokenizer, seq_len=64, classes=True, split="train").ids[0]
    assert ids.tolist() == tokenizer.encode(["One.\nTwo."])[0]


def test_a_tokenizer_without_pad_and_rows_without_room_are_refused(words: Tokenizer, tmp_path: Path) -> None:
    rows = [GlueRow(("The river", "rose"), 0.0)]
    with pytest.raises(UserError, match="has no pad token"):
        without = load_tokenizer(str(write_tokenizer(tmp_path, pad=False)))
        encode(rows, without, seq_len=32, classes=True, split="train")
    with pytest.raises(UserError, match=r"data.seq_len=3: leaves no room"):
        encode(rows, words, seq_len=3, classes=True, split="train")


def encoded_rows(count: int, words: Tokenizer) -> EncodedRows:
    rows = [GlueRow(texts, label) for texts, label in examples(TASKS["mrpc"], count, 5)]
    return encode(rows, words, seq_len=32, classes=True, split="train")


def batches(rows: EncodedRows, **keys: Any) -> GlueBatches:
    settings: dict[str, Any] = {"batch_size": 4, "micro_batches": 1, "rank": 0, "world_size": 1, "seed": 3}
    return GlueBatches(rows, "mrpc", **settings | keys)


def numbers(batch: dict[str, Any]) -> list[int]:
    return [int(name.split()[1]) for name in batch["documents"]]


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(words: Tokenizer) -> None:
    rows = encoded_rows(22, words)
    taken = list(itertools.islice(batches(rows), 12))  # 6 updates an epoch: 5 of 4 rows, 1 of 2
    assert [batch["window_targets"] for batch in taken] == [4, 4, 4, 4, 4, 2] * 2
    epochs = [[row for batch in part for row in numbers(batch)] for part in (taken[:6], taken[6:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(22)) and epochs[0] != epochs[1]
    assert epochs[0] != [row for batch in itertools.islice(batches(rows, seed=4), 6) for row in numbers(batch)]


@pytest.mark.parametrize(("micro_batches", "world_size"), [(1, 1), (2, 1), (3, 2)])
def test_it_goes_on_from_any_update(micro_batches: int, world_size: int, words: Tokenizer) -> None:
    rows = encoded_rows(26, words)
    for rank in range(world_size):
        keys = {"micro_batches": micro_batches, "world_size": world_size, "rank": rank}
        whole = list(itertools.islice(batches(rows, **keys), 8 * micro_batches))
        for updates in (1, 2, 5):
            done = updates * micro_batches
            position = json.loads(json.dumps(whole[done - 1]["position"]))
            later = list(itertools.islice(batches(rows, **keys, position=[position] * world_size), len(whole) - done))
            assert [numbers(batch) for batch in later] == [numbers(batch) for batch in whole[done:]]
            assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(later, whole[done:], strict=True))


def test_ranks_share_an_update_and_an_empty_micro_batch_counts_nothing(words: Tokenizer) -> None:
    rows = encoded_rows(13, words)  # updates of 2 x 2 x 2 rows, then of 5
    ranks = [
        list(itertools.islice(batches(rows, batch_size=2, micro_batches=2, world_size=2, rank=rank), 4))
        for rank in (0, 1)
    ]
    seen = [[row for batch in rank for row in numbers(batch)] for rank in ranks]
    assert sorted(seen[0] + seen[1]) == list(range(13))
    assert [batch["window_targets"] for batch in ranks[0]] == [4, 4, 3, 3]
    assert [batch["window_targets"] for batch in ranks[1]] == [4, 4, 2, 2]
    empty = ranks[1][3]
    assert empty["labels"].tolist() == [NO_LABEL] and empty["num_tokens"] == 0 and empty["documents"] == []


def test_another_seed_or_other_rows_cannot_go_on(words: Tokenizer) -> None:
    rows = encoded_rows(12, words)
    position = next(iter(batches(rows)))["position"]
    for other in (batches, lambda rows, **keys: batches(encoded_rows(11, words), **keys)):
        with pytest.raises(UserError, match=r"start anew with resume=false"):
            other(rows, seed=3 if other is not batches else 4, position=position)


def test_an_evaluation_sees_every_row_once(words: Tokenizer) -> None:
    rows = encoded_rows(23, words)
    found = list(GlueValidation({"validation": rows}, 4).batches("validation"))
    assert sum(len(batch["labels"]) for batch in found) == 23
    assert sum(batch["num_tokens"] for batch in found) == sum(map(len, rows.ids))
    assert sum(int(batch["labels"].sum()) for batch in found) == sum(rows.labels)


@pytest.mark.parametrize(("task", "split"), list(OFFICIAL))
def test_published_files_have_their_rows_and_labels(task: str, split: str, real_data: Path) -> None:
    rows = read_split(data_of(task, folder=str(real_data / "glue")), split)
    count, by_label = OFFICIAL[task, split]
    assert len(rows) == count
    if by_label is not None:
        assert [sum(row.label == label for row in rows) for label in range(len(by_label))] == by_label


@pytest.mark.parametrize("task", ["mnli", "qqp", "qnli"])
def test_subsets_as_json_lines(task: str, real_data: Path) -> None:
    folder = real_data / "glue" / TASKS[task].folder
    data = data_of(
        task, train=[str(folder / "train.subset.jsonl")], validation=[str(folder / "validation.subset.jsonl")]
    )
    assert len(read_split(data, "train")) == 8999
    assert len(read_split(data, TASKS[task].validation[0])) == 1000
    native = read_split(data_of(task, train=[str(folder / "train.kshot-union.tsv")]), "train")
    assert {row.label for row in native} == set(map(float, range(len(TASKS[task].labels))))
