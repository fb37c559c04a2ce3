"""The nine tasks of GLUE (Wang et al., arXiv 1804.07461): their files, their rows, and batches that resume exactly."""

from lowrank_train.data.glue.batches import GlueBatches, GlueValidation, encoded_rows, glue_fingerprint, load_rows
from lowrank_train.data.glue.encoding import EncodedRows, encode
from lowrank_train.data.glue.reading import GlueRow, read_split, splits_of, task_of
from lowrank_train.data.glue.tasks import TASKS, GlueTask

__all__ = [
    "TASKS",
    "EncodedRows",
    "GlueBatches",
    "GlueRow",
    "GlueTask",
    "GlueValidation",
    "encode",
    "encoded_rows",
    "glue_fingerprint",
    "load_rows",
    "read_split",
    "splits_of",
    "task_of",
]
