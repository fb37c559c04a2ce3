"""Out of the house: export proves itself or leaves nothing, and what was exported reads, writes and scores the same."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lowrank_train import export as export_module
from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.config.schema import GenerateConfig
from lowrank_train.evaluate.command import evaluate_trained
from lowrank_train.evaluate.generate import sample
from lowrank_train.evaluate.loading import open_trained
from lowrank_train.strategy import Strategy
from tests.train.conftest import corpus, run, tiny  # noqa: F401  (fixtures)

Run = Callable[..., Path]


@pytest.mark.parametrize(
    "settings",
    [[], ["model.tie_word_embeddings=true", "precision=bf16"]],
    ids=["float32", "bfloat16, tied embeddings"],
)
def test_an_export_is_a_plain_hugging_face_folder_that_scores_the_same(
    run: Run,  # noqa: F811
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run("r", "trainer.steps=6", *settings)
    hub = tmp_path / "hub" / "x"
    capsys.readouterr()
    assert main(["export", f"run={folder}", f"out={hub}"]) == 0
    out, err = capsys.readouterr()
    assert "differ by at most 0.0e+00" in out and err == ""
    assert {path.name for path in hub.iterdir()} >= {"config.json", "model.safetensors", "generation_config.json"}
    assert not list(hub.parent.glob("*.partial"))
    config = json.loads((hub / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(hub)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == tokenizer.eos_token_id == 1 and config["pad_token_id"] == 0
    reloaded = AutoModelForCausalLM.from_pretrained(hub)
    assert reloaded.dtype == (torch.bfloat16 if settings else torch.float32)
    losses = []
    for source in (folder, hub):
        data = [] if source is folder else words_of_data(folder)
        assert main(["evaluate", f"run={source}", "trainer.batch_size=4", *data]) == 0
        found = re.search(r"loss +([\d.]+) nats", capsys.readouterr().out)
        assert found
        losses.append(float(found.group(1)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert losses[0] == pytest.approx(result["val_loss"], abs=1e-4)


def words_of_data(folder: Path) -> list[str]:
    """The data of a run as words of a command line."""
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    validation = re.search(r"validation:\s*\n\s*- (.+)", text)
    assert validation
    return [f"data.validation=[{validation.group(1).strip()}]", "data.seq_len=32"]


@pytest.mark.parametrize("fault", ["weights", "tokenizer"])
def test_an_export_that_is_not_the_same_fails_and_leaves_nothing(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    folder = run("r", "trainer.steps=5")
    write = export_module.write_hugging_face

    def write_with_a_fault(config: object, trained: object, partial: Path) -> None:
        write(config, trained, partial)  # type: ignore[arg-type]
        if fault == "weights":
            weights = load_file(partial / "model.safetensors")
            weights["model.norm.weight"][3] += 0.1
            save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        else:
            path = partial / "tokenizer.json"
            data = json.loads(path.read_text(encoding="utf-8"))
            data["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
            path.write_text(json.dumps(data), encoding="utf-8")

    monkeypatch.setattr(export_module, "write_hugging_face", write_with_a_fault)
    assert main(["export", f"run={folder}", f"out={tmp_path / 'hub'}"]) == 1
    assert "export failed" in capsys.readouterr().err
    assert not list(tmp_path.glob("hub*"))


@pytest.mark.parametrize("kind", ["tied bfloat16 LLaMA with adapters", "BERT"])
def test_arithmetic_in_float64_is_that_of_the_whole_model_in_float64(kind: str) -> None:
    """Exactly; afterwards every tensor is the one it was, with no number changed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "BERT":
        model: PreTrainedModel = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=48))
    else:
        llama = LlamaConfig(**sizes, intermediate_size=48, tie_word_embeddings=True)
        model = LlamaForCausalLM(llama).to(torch.bfloat16)
        strategy = Strategy.from_config(compose(["strategy=lora", "strategy.weights.rank=4"]).strategy, seed=1)
        strategy.prepare(model)
        for name, param in model.named_parameters():
            if name.endswith(".lora_B"):
                torch.nn.init.normal_(param)
    model.eval()
    ids = torch.randint(64, (2, 17))
    before = tensors(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(input_ids=ids).logits
        with export_module.float64(model):
            found = model(input_ids=ids).logits
    assert found.dtype == torch.float64 and torch.equal(found, expected)
    assert found.std() > 1e-3  # not all the same number
    assert tensors(model) == before


def tensors(model: PreTrainedModel) -> dict[str, tuple[int, int, torch.dtype]]:
    """Which tensors they are, where their numbers lie, and in what dtype."""
    state = model.state_dict(keep_vars=True)
    return {name: (id(tensor), tensor.data_ptr(), tensor.dtype) for name, tensor in state.items()}


def test_generate_is_seeded_and_reads_runs_and_folders(
    run: Run,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run("r", "trainer.steps=5")
    assert main(["export", f"run={folder}", f"out={tmp_path / 'hub'}"]) == 0
    capsys.readouterr()

    def text(source: Path, *more: str) -> str:
        settings = ["generate.max_new_tokens=12", "generate.prompt=ROMEO", *more]
        assert main(["generate", f"run={source}", *settings]) == 0
        out = capsys.readouterr().out
        assert isinstance(out, str)
        return out

    first = text(folder, "seed=7")
    assert first.startswith("ROMEO") and len(first) > len("ROMEO\n")
    assert text(folder, "seed=7") == first == text(tmp_path / "hub", "seed=7")
    assert text(folder, "seed=8") != first
    greedy = [text(folder, "generate.temperature=0", f"seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    two = text(folder, "generate.num_samples=2")
    assert two.count("----") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "run=NOWHERE", "out=x"], "NOWHERE"),
        (["export", "run=RUN"], "out="),
        (["export", "run=RUN", "out=RUN"], "not empty"),
        (["generate", "run=RUN", "generate.prompt=" + "word " * 1100], "shorten"),
        (["evaluate"], "run="),
    ],
)
def test_mistakes_are_said_in_words(
    run: Run,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    folder = run("r", "trainer.steps=4")
    capsys.readouterr()
    assert main([word.replace("RUN", str(folder)) for word in words]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_tokenizer_that_does_not_fit_is_refused(
    run: Run,  # noqa: F811
    real_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run("r", "trainer.steps=4")
    other = real_data / "llama-checkpoint" / "tok512.model"
    assert main(["evaluate", f"run={folder}", f"data.tokenizer={other}"]) == 2
    assert "is not the tokenizer" in capsys.readouterr().err
    hub = real_data / "llama-checkpoint" / "stories260K-hf"
    large = real_data / "tokenizers" / "t5-base" / "spiece.model"
    assert main(["evaluate", f"run={hub}", f"data.tokenizer={large}"]) == 2
    assert "has an embedding of 512 rows" in capsys.readouterr().err


def test_a_real_pretrained_llama_scores_as_transformers_says(real_data: Path, corpus: Path) -> None:  # noqa: F811
    folder = real_data / "llama-checkpoint" / "stories260K-hf"
    story = corpus / "story.jsonl"
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    story.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    words = [f"run={folder}", f"data.validation=[{story}]", "data.packing=pad", "data.seq_len=64"]
    config = compose(["task=evaluate", *words])
    trained = open_trained(config)
    found = evaluate_trained(config, trained)
    ids = trained.tokenizer.encode([text])[0]
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    row = torch.tensor([[*ids, trained.tokenizer.eos_id]])
    assert found.loss == pytest.approx(plain(input_ids=row, labels=row).loss.item(), abs=1e-4)
    assert found.num_targets == len(ids)
    assert found.perplexity < 20  # it knows this kind of story
    assert trained.begin_id == trained.tokenizer.bos_id
    text = sample(
        trained.model, trained.tokenizer, GenerateConfig(prompt="Once upon a time", temperature=0, max_new_tokens=20),
        seed=0, begin_id=trained.begin_id,
    )[0]  # fmt: skip
    assert text.startswith("Once upon a time, there was a little")
