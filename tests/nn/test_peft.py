"""PEFT's methods as representations: every one that stands for a matrix, on a tiny LLaMA, and why the others do not."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.adapter_files import base_model, read_adapter, write_adapter
from lowrank_train.config import UserError, compose
from lowrank_train.config.paths import ROOT
from lowrank_train.config.peft_names import REFUSED, methods, options_of
from lowrank_train.config.schema import ModelConfig, RunConfig, StrategyConfig
from lowrank_train.data import load_tokenizer
from lowrank_train.evaluate.loading import Trained
from lowrank_train.models import build_model, meta_model
from lowrank_train.nn.peft import Peft, PeftLinear, mapping
from lowrank_train.nn.reparam import layers_of
from lowrank_train.strategy import Strategy
from tests.nn.methods import ADAMW

pytest.importorskip("peft", reason="the extra `peft` is not installed")

TOKENIZER = ROOT / "data" / "shakespeare" / "tokenizer.model"
SIZES = [
    "strategy=full",
    "model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=2", "model.num_attention_heads=2",
]  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "use_dora": True},
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 1, "total_step": 8, "tfinal": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "DEFT": {},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
"""Every method of PEFT that is a representation, with options that fit a LLaMA of width 16."""
OTHER_FORMS: list[tuple[str, dict[str, Any]]] = [
    ("LORA", {"r": 4, "use_rslora": True, "lora_bias": False}),
    ("LORA", {"r": 4, "init_lora_weights": "pissa"}),
    ("LORA", {"r": 4, "init_lora_weights": "olora"}),
    ("LORA", {"r": 4, "base": "nf4"}),
    ("OFT", {"oft_block_size": 4, "base": "nf4"}),
    ("MISS", {"r": 4, "init_weights": "bat"}),
    ("VERA", {"r": 8, "save_projection": False}),
]
CASES = [*TYPES.items(), *OTHER_FORMS]
NO_META = {"FROD", "SHIRA"}  # they read the numbers of W0 to choose what is trained


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}-{'-'.join(map(str, case[1].values()))}" if case in OTHER_FORMS else case[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a model that is fine-tuned from a folder, in which a tiny LLaMA of random weights lies."""
    folder = tmp_path_factory.mktemp("base")
    made = compose([*SIZES, f"data.tokenizer={TOKENIZER}", "recipe=null"])
    vocab = load_tokenizer(str(TOKENIZER)).vocab_size
    build_model(made.model, vocab_size=vocab, dtype=torch.float32, device="cpu", seed=3).save_pretrained(folder)
    return compose(["strategy=full", "model=hf", f"model.path={folder}", f"data.tokenizer={TOKENIZER}", "recipe=null"])


@functools.lru_cache(maxsize=1)
def loaded(folder: str) -> PreTrainedModel:
    vocab = load_tokenizer(str(TOKENIZER)).vocab_size
    model = ModelConfig(kind="hf", path=folder)
    return build_model(model, vocab_size=vocab, dtype=torch.float32, device="cpu", seed=0)


def base_of(config: RunConfig) -> PreTrainedModel:
    assert config.model.path
    return copy.deepcopy(loaded(config.model.path))


def strategy_of(kind: str, options: dict[str, Any], **changes: Any) -> Strategy:
    part = {"_target_": "lowrank_train.nn.peft.Peft", "type": kind, **options}
    return Strategy.from_config(StrategyConfig(name="peft", weights=part, rest=ADAMW, **changes), seed=42)


def adapted(config: RunConfig, case: tuple[str, dict[str, Any]]) -> tuple[PreTrainedModel, Strategy, Any]:
    model, strategy = base_of(config), strategy_of(*case)
    strategy.prepare(model)
    return model, strategy, strategy.optimizer(model, lr=1e-2)


def train(model: PreTrainedModel, strategy: Strategy, optimizer: Any, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)  # PVeRA draws in training
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.run_events(step, model, optimizer)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(3, 19)[None]).logits
    return found


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_trains_its_adapters_folds_and_is_read_by_peft(
    case: tuple[str, dict[str, Any]], config: RunConfig, tmp_path: Path
) -> None:
    """2e-5: sums of 24 terms in float32 over two layers, in the orders of the layer, of the fold and of PEFT."""
    model, strategy, optimizer = adapted(config, case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained and all("adapted" in name and "base_layer" not in name for name in trained)
    train(model, strategy, optimizer, range(1, 4))
    model.eval()
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert changed and changed <= trained
    for layer in layers_of(model).values():
        assert isinstance(layer, PeftLinear)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight()), atol=2e-5, rtol=1e-4)
    plain = base_of(config).eval()
    started = logits(plain)
    plain.load_state_dict(strategy.dense_state_dict(model), strict=True)
    torch.testing.assert_close(logits(plain), logits(model), atol=2e-5, rtol=0)
    assert not torch.equal(logits(plain), started)
    tokenizer = load_tokenizer(str(TOKENIZER))
    held = Trained(model, tokenizer, strategy, "", torch.device("cpu"))
    write_adapter(config, held, tmp_path)
    read = read_adapter(base_model(config, held), tmp_path)
    torch.testing.assert_close(logits(read), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_resumes_exactly(case: tuple[str, dict[str, Any]], config: RunConfig, tmp_path: Path) -> None:
    model, strategy, optimizer = adapted(config, case)
    train(model, strategy, optimizer, range(1, 4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, strategy, optimizer, range(4, 9))
    again, strategy_again, optimizer_again = adapted(config, case)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(saved["model"], strict=True)
    optimizer_again.load_state_dict(saved["optimizer"])
    train(again, strategy_again, optimizer_again, range(4, 9))
    expected = model.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert [name for name, value in again.state_dict().items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("kind", TYPES)
def test_is_counted_without_memory(kind: str, config: RunConfig) -> None:
    real, _, _ = adapted(config, (kind, TYPES[kind]))
    vocab = load_tokenizer(str(TOKENIZER)).vocab_size
    model = meta_model(config.model, vocab_size=vocab)
    strategy = strategy_of(kind, TYPES[kind])
    if kind in NO_META:
        with pytest.raises(UserError, match=f"type={kind}: PEFT reads the matrices themselves"):
            strategy.prepare(model)
        return
    strategy.prepare(model)
    described = [
        {name: (value.shape, value.dtype, value.requires_grad) for name, value in one.named_parameters()}
        for one in (real, model)
    ]
    assert described[0] == described[1]
    assert all(value.is_meta for value in layers_of(model)["model.layers.0.mlp.up_proj"].state_dict().values())


def test_every_method_is_in_the_table_or_refused_with_a_reason() -> None:
    assert set(TYPES) | set(REFUSED) == set(methods()) and not set(TYPES) & set(REFUSED)
    for kind in REFUSED:
        with pytest.raises(ValueError, match=re.escape(REFUSED[kind])):
            Peft(type=kind)


def test_the_sources_say_what_the_classes_are() -> None:
    """Names and options are read without importing PEFT; they are those of its classes."""
    import dataclasses

    real = {str(kind.name): maker for kind, maker in mapping().PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert set(real) == set(methods())
    for kind, place in methods().items():
        assert set(options_of(*place)) == {item.name for item in dataclasses.fields(real[kind])}, kind


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy.weights.type=VERAA"], "Did you mean VERA?"),
        (["strategy.weights.type=prefix_tuning"], "vectors before the input"),
        (["strategy.weights.type=vera", "strategy.weights.d_inital=1"], "Did you mean strategy.weights.d_initial?"),
        (["strategy.weights.target_modules=[q_proj]"], "is said by strategy.weights.modules here"),
        (["strategy.weights.inference_mode=true"], "is set from the rest of the configuration"),
        (["strategy.weights.init_lora_weights=eva"], "needs a pass over data"),
    ],
)
def test_refused_before_anything_is_loaded(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        compose(["strategy=peft", "recipe=null", "task=explain", *words])


def test_what_peft_itself_refuses_is_said_in_its_words(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"type=VBLORA: PEFT says: .*must be divisible"):
        adapted(config, ("VBLORA", {"vector_length": 7}))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ValueError, match=re.escape("pip install 'lowrank_train[peft]'")):
        Peft()
    methods.cache_clear()
    try:
        with pytest.raises(UserError, match=re.escape("pip install 'lowrank_train[peft]'")):
            compose(["strategy=vera", "recipe=null", "task=explain"])
    finally:
        methods.cache_clear()
