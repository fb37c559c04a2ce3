"""`lowrank export adapter=true`: PEFT reads what our own adapters are, or the reason why it cannot is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from lowrank_train.adapter_files import write_adapter
from lowrank_train.cli import main
from lowrank_train.config import UserError, compose
from lowrank_train.config.schema import RunConfig, StrategyConfig
from lowrank_train.data import load_tokenizer
from lowrank_train.evaluate.loading import Trained
from lowrank_train.export import compare_adapter
from lowrank_train.models import build_model
from lowrank_train.strategy import Strategy
from tests.nn.methods import ADAMW
from tests.nn.test_peft import TOKENIZER, base_of, config, train  # noqa: F401  (fixture)
from tests.train.conftest import corpus, run, tiny  # noqa: F401  (fixtures)

peft: Any = pytest.importorskip("peft", reason="the extra `peft` is not installed")

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora.LoRA", {"rank": 3, "alpha": 6.0}),
    "rslora": ("lora.LoRA", {"rank": 3, "rslora": True}),
    "lora_fa": ("lora.LoRA", {"rank": 3, "train_a": False}),
    "pissa": ("lora.LoRA", {"rank": 3, "init": "pissa"}),
    "olora": ("lora.LoRA", {"rank": 3, "init": "olora"}),
    "pissa of nearly full rank": ("lora.LoRA", {"rank": 13, "init": "pissa"}),
    "dora": ("dora.DoRA", {"rank": 3}),
    "loha": ("loha.LoHa", {"rank": 2, "alpha": 4.0}),
    "lora_pro": ("lora_pro.LoRAPro", {"rank": 3}),
    "lora_xs": ("three_factors.LoRAXS", {"rank": 3, "alpha": 6.0}),
    "lora_sb": ("lora_sb.LoRASB", {"rank": 3}),
    "lora_ga": ("lora_from_data.LoRAGA", {"rank": 3}),
    "eva": ("lora_from_data.EVA", {"rank": 3}),
    "pmss": ("from_columns.PMSS", {"rank": 3, "alpha": 2.0}),
    "nlora": ("from_columns.NLoRA", {"rank": 3}),
    "nora": ("nested_lora.NoRA", {"rank": 2, "outer_rank": 5}),
    "o_lora": ("o_lora.OLoRA", {"rank": 3}),
    "allora": ("allora.ALLoRA", {"rank": 3}),
    "allora of pissa": ("allora.ALLoRA", {"rank": 3, "init": "pissa"}),
    "lora_ggpo": ("lora_ggpo.LoRAGGPO", {"rank": 3}),
    "lamda": ("lamda.LaMDA", {"rank": 3, "stages": 2, "freeze_steps": 3}),
    "curlora": ("three_factors.CURLoRA", {"rank": 3, "alpha": 2.0}),
    "svfit": ("three_factors.SVFit", {"rank": 3}),
    "sorsa": ("three_factors.SORSA", {"rank": 3, "alpha": 6.0}),
    "sorsa of nearly full rank": ("three_factors.SORSA", {"rank": 13}),
    "loldu": ("three_factors.LoLDU", {"rank": 3, "alpha": 6.0}),
    "moslora": ("between.MoSLoRA", {"rank": 3, "rslora": True}),
    "sora": ("between.SoRA", {"rank": 3, "threshold": 0.01}),
    "melora": ("patterned_lora.MELoRA", {"rank": 2, "minis": 4, "rslora": True}),
    "capaboost": ("patterned_lora.CapaBoost", {"rank": 2, "copies": 3}),
    "dylora": ("dylora.DyLoRA", {"rank": 4, "used_rank": 3}),
    "nola": ("nola.NOLA", {"rank": 3, "bases": 20}),
}
"""Choices that PEFT has too, or that are a LoRA of some rank when they are done."""


def trained_with(config: RunConfig, target: str, options: dict[str, Any], merge: bool = False) -> Trained:  # noqa: F811
    settings: dict[str, Any] = {"weights": {"_target_": f"lowrank_train.nn.{target}", **options}, "rest": ADAMW}
    if merge:
        settings["merge"] = {"_target_": "lowrank_train.nn.merge.Merge", "every": 2}
    strategy, model = Strategy.from_config(StrategyConfig(name="x", **settings), seed=42), base_of(config)
    strategy.prepare(model)
    train(model, strategy, strategy.optimizer(model, lr=1e-2), range(1, 5))
    return Trained(model.eval(), load_tokenizer(str(TOKENIZER)), strategy, "", torch.device("cpu"))


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_ours(name: str, config: RunConfig, tmp_path: Path) -> None:  # noqa: F811
    """With the embedding, the head and the norms, which are trained too; 2e-5 in logits: the order of float32 sums, and
    for pissa and olora a decomposition of the difference from the base."""
    trained = trained_with(config, *OURS[name])
    write_adapter(config, trained, tmp_path)
    difference, positions = compare_adapter(config, trained, tmp_path)
    assert difference < 2e-5 and positions > 50
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == config.model.path
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= set(written["modules_to_save"])


@pytest.mark.parametrize(
    ("target", "options", "merge", "said"),
    [
        ("mora.MoRA", {"rank": 3}, False, "PEFT has no MoRA"),
        ("dora.DoRA", {"rank": 3, "init": "pissa"}, False, "over what init=pissa leaves of W0"),
        ("lora.LoRA", {"rank": 3, "warm_start_steps": 2}, False, "has trained W0 itself"),
        ("lora.LoRA", {"rank": 3}, True, "strategy.merge has put the adapters into the base"),
    ],
)
def test_what_no_adapter_can_hold_is_refused(
    target: str, options: dict[str, Any], merge: bool, said: str, config: RunConfig, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=re.escape(said)):
        write_adapter(config, trained_with(config, target, options, merge), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("target", ["peft.Peft", "lora.LoRA"])
def test_the_head_of_a_classifier_goes_with_it(target: str, tmp_path: Path) -> None:
    """An encoder of RoBERTa's kind with two labels; the base is frozen under PEFT, its head is not."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocab = load_tokenizer(str(TOKENIZER)).vocab_size
    made = RobertaConfig(vocab_size=vocab, max_position_embeddings=130, pad_token_id=0, **sizes)
    RobertaForMaskedLM(made).save_pretrained(tmp_path / "base")
    words = ["strategy=full", "model=hf", f"model.path={tmp_path / 'base'}", "recipe=null", "data=glue"]
    config = compose([*words, "data.task=rte", f"data.tokenizer={TOKENIZER}", "task=explain"])  # noqa: F811
    model = build_model(config.model, vocab_size=vocab, dtype=torch.float32, device="cpu", seed=config.seed, outputs=2)
    model.config.pad_token_id = 0
    weights = {"_target_": f"lowrank_train.nn.{target}", "modules": ["*.attention.*"]}
    strategy = Strategy.from_config(StrategyConfig(name="x", weights=weights, rest=ADAMW), seed=config.seed)
    strategy.prepare(model)
    trained = {name.split(".")[0] for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {"roberta", "classifier"}
    optimizer = strategy.optimizer(model, lr=1e-2)
    for _ in range(3):
        model(input_ids=torch.arange(3, 23).view(2, 10), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = Trained(model.eval(), load_tokenizer(str(TOKENIZER)), strategy, "", torch.device("cpu"))
    write_adapter(config, held, tmp_path / "adapter")
    assert compare_adapter(config, held, tmp_path / "adapter")[0] < 2e-5
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["task_type"] == "SEQ_CLS" and "classifier" in written["modules_to_save"]


def test_from_the_command_line(
    run: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = run("first", "strategy=full", "trainer.steps=5")
    assert main(["export", f"run={first}", f"out={tmp_path / 'base'}"]) == 0
    capsys.readouterr()
    assert main(["export", f"run={first}", f"out={tmp_path / 'no'}", "adapter=true"]) == 2
    assert "has no adapters; leave out adapter=true" in capsys.readouterr().err
    for words in (["strategy=vera"], ["strategy=dora", "strategy.weights.rank=4"]):
        name = words[0].removeprefix("strategy=")
        adapter, whole = tmp_path / f"{name} adapter", tmp_path / f"{name} merged"
        tuned = run(name, "model=hf", f"model.path={tmp_path / 'base'}", *words, "trainer.steps=8")
        capsys.readouterr()
        assert main(["export", f"run={tuned}", f"out={adapter}", "adapter=true"]) == 0
        assert "reloaded with PeftModel" in capsys.readouterr().out
        assert main(["export", f"run={tuned}", f"out={whole}"]) == 0
        merged = AutoModelForCausalLM.from_pretrained(whole)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        ids = torch.tensor([AutoTokenizer.from_pretrained(adapter)("To be, or not to be")["input_ids"]])
        before = base(input_ids=ids).logits.detach()
        read = peft.PeftModel.from_pretrained(base, adapter).eval()
        torch.testing.assert_close(read(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=0)
        assert float((read(input_ids=ids).logits.detach() - before).abs().max()) > 1e-4
        assert {path.name for path in adapter.iterdir()} >= {
            "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        }  # fmt: skip


def test_a_run_from_random_weights_has_no_base(
    run: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run("r", "strategy=lora", "strategy.weights.rank=4", "trainer.steps=4")
    capsys.readouterr()
    assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", "adapter=true"]) == 2
    assert "needs a base model that can be loaded" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
