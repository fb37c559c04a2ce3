"""GLUE, models and tokenizers from the hub, by the command, against a server that speaks the hub's language."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_train.cli import main
from lowrank_train.data.glue.tasks import HUB_REPOSITORY, HUB_REVISION, TASKS
from tests.data.glue_files import examples, write_tokenizer
from tests.glue.conftest import result_of
from tests.local_server import LocalServer
from tests.train.conftest import without_card

PINNED = "5e6c0b44f41e2fd3da2e5ba9a4a9a2ee3c1c8f0d"  # of the models; they have no other revision here
TRAIN_ROWS, VALIDATION_ROWS = 24, 20


class Hub(LocalServer):
    """Repositories under `root` (models/NAME, datasets/NAME), each at one revision."""

    def __init__(self, root: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                path = self.path.partition("?")[0].strip("/")
                if path.startswith("api/"):
                    self._answer(404, b"{}")
                    return
                kind = "datasets" if path.startswith("datasets/") else "models"
                repository, _, asked = path.removeprefix("datasets/").partition("/resolve/")
                revision, _, name = asked.partition("/")
                folder = root / kind / repository
                if not folder.is_dir():
                    self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
                elif revision != (PINNED if kind == "models" else HUB_REVISION):
                    self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                elif not (folder / name).is_file():
                    self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
                else:
                    content = (folder / name).read_bytes()
                    tag = hashlib.sha256(content).hexdigest()
                    self._answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": revision})

            def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

        super().__init__(Handler)


@pytest.fixture
def hub(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """RTE, an encoder and a LLaMA; huggingface_hub asks this server, and its cache is empty."""
    root = tmp_path / "hub"
    write_parquet(root / "datasets" / HUB_REPOSITORY / "rte")
    shutil.copytree(encoder, root / "models" / "org" / "encoder")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))
    llama.save_pretrained(write_tokenizer(root / "models" / "org" / "llama"))
    server = Hub(root)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    point_to(server.address, monkeypatch)
    yield server
    server.close()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does before huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def write_parquet(folder: Path) -> None:
    """RTE under the hub's names."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True)
    for seed, (split, count) in enumerate({"train": TRAIN_ROWS, "validation": VALIDATION_ROWS}.items()):
        rows = [
            {"sentence1": texts[0], "sentence2": texts[1], "label": int(label), "idx": number}
            for number, (texts, label) in enumerate(examples(TASKS["rte"], count, seed))
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


Train = Callable[..., int]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """The command of a run called `name` on RTE or, with a text of its own, of a causal model."""

    def call(name: str, model: str, *more: str) -> int:
        text = tmp_path / "text.jsonl"
        text.write_text(json.dumps({"text": "The court rose on day 1 . The film fell on day 2 . " * 8}) + "\n")
        data = ["data=glue", "data.task=rte", "optim=linear", "trainer.epochs=1"]
        if model == "org/llama":
            data = [f"data.train=[{text}]", f"data.validation=[{text}]", "trainer.steps=2"]
        words = [
            "recipe=null", "model=hf", f"model.path={model}", f"model.revision={PINNED}", *data, "data.seq_len=32",
            "trainer.batch_size=4", "trainer.accelerator=cpu", "strategy=full", f"output_dir={tmp_path}",
            f"run_name={name}", *more,
        ]  # fmt: skip
        with without_card():
            return main(words)

    return call


def test_glue_a_model_and_its_tokenizer_come_at_their_pinned_revisions(
    hub: Hub, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The encoder's and the LLaMA's tokenizers too: at `main` there is nothing. Once fetched, no network is needed."""
    assert train("glue", "org/encoder") == 0
    assert result_of(tmp_path / "glue")["val_rows"] == VALIDATION_ROWS
    fetched = {path for path in hub.asked if "/resolve/" in path}
    for split in ("train", "validation"):
        file = f"rte/{split}-00000-of-00001.parquet"
        assert f"/datasets/{HUB_REPOSITORY}/resolve/{HUB_REVISION}/{file}" in fetched
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"/org/encoder/resolve/{PINNED}/{file}" in fetched
    assert train("llama", "org/llama") == 0
    assert main(["export", f"run={tmp_path / 'llama'}", f"out={tmp_path / 'exported'}"]) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert train("again", "org/encoder") == 0
    assert hub.asked == []
    first, second = (result_of(tmp_path / name) for name in ("glue", "again"))
    assert first["metrics"] == second["metrics"] and first["val_loss"] == second["val_loss"]


UNKNOWN = "org/nowhere is not a local folder and is not a valid model identifier"


@pytest.mark.parametrize(
    ("state", "model", "more", "said"),
    [
        ("online", "org/nowhere", [], ["model.path=org/nowhere", "nor a tokenizer the hub gives", UNKNOWN]),
        ("online", "org/nowhere", ["TOKENIZER"], ["model.path=org/nowhere cannot be loaded", UNKNOWN]),
        ("online", "org/llama", ["model.revision=main"], ["model.path=org/llama", "is not a valid git identifier"]),
        ("no data", "org/encoder", [], ["data.task=rte", "Repository Not Found", "data.folder=FOLDER"]),
        ("offline", "org/encoder", [], ["data.task=rte", "HF_HUB_OFFLINE is set", "--repo-type dataset"]),
        ("offline", "org/llama", [], ["HF_HUB_OFFLINE is set", f"hf download org/llama --revision {PINNED}"]),
        ("offline", "org/llama", ["TOKENIZER"], ["HF_HUB_OFFLINE is set", f"org/llama --revision {PINNED}"]),
        ("unplugged", "org/encoder", [], ["data.task=rte", "cannot be reached", "--repo-type dataset"]),
        ("unplugged", "org/llama", ["TOKENIZER"], ["model.path=org/llama", "cannot be reached", "hf download"]),
    ],
)
def test_what_the_hub_does_not_give(
    hub: Hub,
    train: Train,
    encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    state: str,
    model: str,
    more: list[str],
    said: list[str],
) -> None:
    """One line with the key, the value, the cause and the way out, and exit code 2."""
    if state == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif state == "no data":
        shutil.rmtree(tmp_path / "hub" / "datasets")
    elif state == "unplugged":
        hub.close()
        point_to(hub.address, monkeypatch)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between its five tries
    assert train("r", model, *(word.replace("TOKENIZER", f"data.tokenizer={encoder}") for word in more)) == 2
    err = capsys.readouterr().err
    fault = err.strip().splitlines()[-1]
    assert all(part in fault for part in said), err
    assert "Traceback" not in err
