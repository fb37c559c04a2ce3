"""The tasks of GLUE in one table: their sentences, labels, official metrics and the names of their files."""

from __future__ import annotations

from dataclasses import dataclass

HUB_REPOSITORY = "nyu-mll/glue"
HUB_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
LARGEST_SCORE = 5.0  # STS-B: 0 means nothing in common, 5 the same meaning


@dataclass(frozen=True)
class GlueTask:
    """One task. `native` are the columns of the published TSV files, the other names those of the hub."""

    name: str  # as the hub spells it
    folder: str  # as the published archive spells it
    sentences: tuple[str, ...]  # columns of one text, or of a pair
    native: tuple[str, ...]  # the same in the TSV files
    native_label: str
    labels: tuple[str, ...]  # by their number; empty: a score from 0 to 5
    metrics: tuple[str, ...]  # the official ones, as evaluate/glue_metrics.py names them
    validation: tuple[str, ...] = ("validation",)  # splits that are evaluated, as the hub names them
    header: tuple[str, ...] = ()  # the columns of TSV files that begin without naming them

    @property
    def num_outputs(self) -> int:
        """Numbers that the model gives for a row: one a label, or the score."""
        return len(self.labels) or 1

    @property
    def best_by(self) -> tuple[str, str]:
        """Split and metric by which the best evaluation is chosen: the first of each."""
        return self.validation[0], self.metrics[0]


_SAME = ("not_equivalent", "equivalent")
_FOLLOWS = ("entailment", "not_entailment")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "cola", "CoLA", ("sentence",), ("sentence",), "label", ("unacceptable", "acceptable"), ("matthews",),
            header=("source", "label", "star", "sentence"),
        ),
        GlueTask("sst2", "SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive"), ("accuracy",)),
        GlueTask(
            "mrpc", "MRPC", ("sentence1", "sentence2"), ("#1 String", "#2 String"), "Quality", _SAME,
            ("accuracy", "f1"),
        ),
        GlueTask(
            "stsb", "STS-B", ("sentence1", "sentence2"), ("sentence1", "sentence2"), "score", (),
            ("pearson", "spearman"),
        ),
        GlueTask(
            "qqp", "QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate",
            ("not_duplicate", "duplicate"), ("accuracy", "f1"),
        ),
        GlueTask(
            "mnli", "MNLI", ("premise", "hypothesis"), ("sentence1", "sentence2"), "gold_label",
            ("entailment", "neutral", "contradiction"), ("accuracy",),
            validation=("validation_matched", "validation_mismatched"),
        ),
        GlueTask("qnli", "QNLI", ("question", "sentence"), ("question", "sentence"), "label", _FOLLOWS, ("accuracy",)),
        GlueTask(
            "rte", "RTE", ("sentence1", "sentence2"), ("sentence1", "sentence2"), "label", _FOLLOWS, ("accuracy",),
        ),
        GlueTask(
            "wnli", "WNLI", ("sentence1", "sentence2"), ("sentence1", "sentence2"), "label",
            ("not_entailment", "entailment"), ("accuracy",),
        ),
    )
}  # fmt: skip


def file_stems(split: str) -> tuple[str, ...]:
    """What the file of a split may be called, without its suffix: as on the hub, and as in the published archive."""
    return (split, split.replace("validation", "dev")) if split.startswith("validation") else (split,)
