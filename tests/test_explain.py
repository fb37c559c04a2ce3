"""`lowrank explain`: what it says is what the strategy does, and it needs no memory for it."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.explain import explanation
from lowrank_train.models import meta_model
from lowrank_train.report.savings import advice, saving
from lowrank_train.report.units import format_bytes
from lowrank_train.strategy import Assignment, Strategy


def explained(*words: str) -> str:
    return "\n".join(explanation(compose([*words, "task=explain"])))


def test_head_parts_tensors_and_totals() -> None:
    text = explained("strategy=fira", "model=llama_60m", "recipe=galore_60m")
    assert text.startswith("Fira (Chen et al., arXiv 2410.01623)")
    assert "W <- W - lr * (scale * N B^T + S)" in text
    assert "Departures: B comes from a warm-started subspace iteration" in text
    assert "lift: ScaledResidual  scale 0.25, form code" in text
    lines = text.splitlines()
    (down,) = [line.split() for line in lines if "mlp.down_proj" in line]
    assert down[:7] == ["model.layers.*.mlp.down_proj.weight", "8", "512", "x", "1376", "projected", "left"]
    assert (" ".join(down[7:10]), " ".join(down[-2:])) == (
        "128 2.7 MiB",
        "matches strategy.select",
    )  # 8 x 128 x 1376 x 2
    (norm,) = [line for line in lines if line.startswith("model.norm.weight")]
    assert norm.endswith("1-dimensional; only matrices are projected")
    (head,) = [line for line in lines if line.startswith("lm_head.weight")]
    assert head.endswith("matches no pattern of strategy.select")


def test_totals_are_those_of_the_optimizer_and_of_adamw() -> None:
    config = compose(["strategy=galore", "model=llama_60m", "recipe=galore_60m", "task=explain"])
    model = meta_model(config.model, vocab_size=32000)
    rows = Strategy.from_config(config.strategy).assignment(model)
    found = saving(rows, element_bytes=4)
    parameters = sum(param.numel() for param in model.parameters())
    assert found.adamw_bytes == 8 * parameters
    assert found.adamw_8bit_bytes == pytest.approx(2 * parameters * (1 + 4 / 256), rel=1e-3)
    assert found.strategy_bytes == sum(row.state_bytes for row in rows)
    text = explained("strategy=galore", "model=llama_60m", "recipe=galore_60m", "precision=fp32")
    assert (
        f"state of all tensors: {format_bytes(found.strategy_bytes)}; AdamW {format_bytes(found.adamw_bytes)}" in text
    )


def test_what_differs_from_the_strategy_is_marked() -> None:
    text = explained("strategy=fira", "recipe=null", "strategy/subspace=svd", "strategy.lift.form=paper")
    lines = text.splitlines()
    assert any(line.startswith("* subspace: Svd") for line in lines)
    assert any(line.startswith("  lift: ScaledResidual") and "*form paper (its own: code)" in line for line in lines)
    assert any(line.startswith("  inner: Adam") and "*" not in line for line in lines)
    text = explained("strategy=ldadam", "recipe=null", "strategy/feedback=null", "strategy.on_refresh=keep")
    assert "* feedback: none; the strategy's own is ErrorFeedback" in text
    assert "* on_refresh: keep (its own: rotate)" in text


def test_one_rule_for_all_and_frozen_tensors_say_so() -> None:
    assert "one rule for all tensors" in explained("strategy=full")
    text = explained("strategy=badam")
    (embedding,) = [line for line in text.splitlines() if line.startswith("model.embed_tokens.weight")]
    assert embedding.endswith("not trained")


def test_seven_billion_parameters_take_no_memory() -> None:
    tracemalloc.start()
    text = explained("recipe=galore_7b")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "6.74B parameters" in text
    assert peak_bytes < 100e6


def test_verb_and_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "strategy=galore"]) == 0
    assert "GaLore, gradient low-rank projection" in capsys.readouterr().out
    assert main(["explain", "strategy=galore", "strategy.subspace.rank=1000"]) == 2
    assert "is above 128" in capsys.readouterr().err
    assert main(["explain", "strategy=frugal", "strategy/subspace=gaussian"]) == 2
    assert "not orthonormal" in capsys.readouterr().err


def test_residues_are_told_apart_from_the_state_of_rules() -> None:
    """2 bytes a weight, and of the default model 926,336 weights are trained."""
    plain, kahan = (explained("strategy=galore", f"precision={name}") for name in ("bf16", "bf16_kahan"))
    assert f"the same under every strategy: {format_bytes(2 * 926_336)}" in kahan
    assert "residue" not in plain
    assert [line for line in plain.splitlines() if line.startswith("state of")] == [
        line for line in kahan.splitlines() if line.startswith("state of")
    ]


def row(state_bytes: int, role: str = "projected") -> Assignment:
    return Assignment("a.weight", (128, 128), role, "right", 100, state_bytes)


def test_advice_comes_where_nothing_is_saved() -> None:
    """AdamW keeps 2 x 4 x 128 x 128 bytes, in 8 bits 2 x (1 + 4/256) x 128 x 128."""
    assert advice("galore", [row(2 * 4 * 128 * 128 - 1)], 4) == ""
    text = advice("galore", [row(2 * 4 * 128 * 128)], 4)
    assert "AdamW would keep 128.0 KiB, and 8-bit AdamW 32.5 KiB" in text
    assert "strategy.subspace.rank, which is 100" in text
    assert advice("galore", [replace(row(2 * 4 * 128 * 128), residue_bytes=1)], 4) == ""  # AdamW would keep it too
    assert advice("full", [row(1 << 30, role="rest")], 4) == ""
    assert "warning: strategy galore saves nothing here" in explained("strategy=galore", "strategy.subspace.rank=128")


def test_advice_comes_where_layers_train_no_less_than_the_matrices() -> None:
    """Of 128 x 128, rank 128 trains 2 x 128 x 128; the 1M model has 2 layers of 4 such and 3 of 128 x 352."""
    assert "saves nothing" not in explained("strategy=lora", "strategy.weights.rank=8")
    text = explained("strategy=lora", "strategy.weights.rank=128")
    assert f"{2 * 128 * 2 * (4 * 128 + 3 * (128 + 352) // 2):,} numbers in place of" in text
    assert "Lower strategy.weights.rank, which is 128" in text
