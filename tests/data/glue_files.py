"""Small GLUE folders in the published form, and a WordPiece tokenizer over their words."""

from __future__ import annotations

import random
from pathlib import Path

from lowrank_train.data.glue.tasks import TASKS, GlueTask

NOUNS = ("court", "company", "river", "minister", "engine", "market", "school", "film")
VERBS = ("rose", "fell", "opened", "closed", "said so", "denied it", "went home", "was sold")
FOLDER_FILES = {"train": "train.tsv", "validation": "dev.tsv", "validation_matched": "dev_matched.tsv",
                "validation_mismatched": "dev_mismatched.tsv"}  # fmt: skip
NUMBERED = ("cola", "sst2", "mrpc", "qqp", "wnli")  # whose TSV files have numbers for labels


def sentence(random_: random.Random) -> str:
    return f"The {random_.choice(NOUNS)} {random_.choice(VERBS)} on day {random_.randrange(9)} ."


def examples(task: GlueTask, count: int, seed: int) -> list[tuple[tuple[str, ...], float]]:
    """Texts and labels that can be learnt: a pair has the first label where its texts are equal."""
    random_ = random.Random(f"{task.name} {seed}")
    found = []
    for number in range(count):
        label = number % (len(task.labels) or 2)
        texts = [sentence(random_) for _ in task.sentences]
        if len(texts) == 2 and label == 0:
            texts[1] = texts[0]
        if len(texts) == 1:
            texts[0] += " never" if label == 0 else " always"
        found.append((tuple(texts), float(label) if task.labels else (4.25 if label == 0 else 1.5)))
    random_.shuffle(found)
    return found


def native_label(task: GlueTask, label: float) -> str:
    if not task.labels:
        return f"{label:.3f}"
    return str(int(label)) if task.name in NUMBERED else task.labels[int(label)]


def write_tsv(task: GlueTask, rows: list[tuple[tuple[str, ...], float]], path: Path) -> None:
    """A file as the archive has it: CoLA without a header, MRPC with a byte order mark, an index before the others."""
    lines = []
    if task.name == "cola":
        lines = [f"gj04\t{native_label(task, label)}\t\t{texts[0]}" for texts, label in rows]
    else:
        first = [] if task.name == "sst2" else ["index"]
        lines = ["\t".join([*first, *task.native, task.native_label])]
        lines += [
            "\t".join([*([str(number)] if first else []), *texts, native_label(task, label)])
            for number, (texts, label) in enumerate(rows)
        ]
    text = "\n".join(lines) + "\n"
    path.write_bytes((b"\xef\xbb\xbf" if task.name == "mrpc" else b"") + text.encode())


def write_glue(root: Path, names: tuple[str, ...] = tuple(TASKS), *, train: int = 24, validation: int = 10) -> Path:
    """The archive's folders for these tasks."""
    for name in names:
        task = TASKS[name]
        folder = root / task.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_tsv(task, examples(task, train, 0), folder / FOLDER_FILES["train"])
        for number, split in enumerate(task.validation, 1):
            write_tsv(task, examples(task, validation, number), folder / FOLDER_FILES[split])
    return root


def write_tokenizer(folder: Path, *, pad: bool = True) -> Path:
    """A WordPiece tokenizer with BERT's marks, over whole words of these files."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in (*NOUNS, *VERBS) for word in text.split()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "on", "day", ".", "never", "always", *map(str, range(9))]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *words]))}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | ({"pad_token": "[PAD]"} if pad else {})
    names = ["input_ids", "token_type_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **marks)
    made.save_pretrained(str(folder))
    return folder
