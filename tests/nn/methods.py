"""The table of representations: one row here buys a representation every shared test of reparametrised layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.config.schema import StrategyConfig
from lowrank_train.strategy import Strategy

ADAMW = {"_target_": "lowrank_train.optim.moments.Adam"}


@dataclass(frozen=True)
class Method:
    """One row: the representation, whether it is merged, and what cannot be asked of it."""

    name: str
    weights: dict[str, Any]
    merge: dict[str, Any] | None = None
    keeps_weight: bool = True  # at the start dense_weight() is the matrix it was built from
    steps: int = 12  # updates that see every kind of event of this row at least once
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16))
    same_on_meta: bool = True  # which shapes there are does not depend on the numbers of the matrices
    same_in_training: bool = True  # forward(x) = F.linear(x, dense_weight()) in training mode too

    def __str__(self) -> str:
        return self.name

    def config(self, **changes: Any) -> StrategyConfig:
        settings: dict[str, Any] = {"weights": dict(self.weights), "rest": ADAMW}
        if self.merge is not None:
            settings["merge"] = {"_target_": "lowrank_train.nn.merge.Merge", **self.merge}
        return StrategyConfig(name=self.name, **(settings | changes))

    def strategy(self, **changes: Any) -> Strategy:
        return Strategy.from_config(self.config(**changes), seed=7)


def weights(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"lowrank_train.nn.{target}", "modules": ["tall", "wide", "square"], **arguments}


class Toy(nn.Module):
    """A tall, a wide and a square matrix, a bias, a norm and an embedding; everything in groups of 4, for 2:4 masks."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)  # torch.manual_seed notes the stack for GPUs not yet in use
            self.embedding = nn.Embedding(11, 12, dtype=dtype)
            self.tall = nn.Linear(12, 20, bias=False, dtype=dtype)
            self.norm = nn.LayerNorm(20, dtype=dtype)
            self.square = nn.Linear(20, 20, dtype=dtype)
            self.wide = nn.Linear(20, 8, bias=False, dtype=dtype)
            self.head = nn.Linear(8, 11, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.tall(self.embedding(tokens)))
        logits: Tensor = self.head(self.wide(hidden + self.square(hidden).tanh()))
        return logits


def batch_of(step: int) -> Tensor:
    """The tokens of an update, counted from 1; every third update sees the same."""
    return torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(step % 3))


def train(
    model: nn.Module, strategy: Strategy, optimizer: torch.optim.Optimizer, steps: range,
    after: Callable[[int], None] | None = None,
) -> list[float]:  # fmt: skip
    """Real updates with their events; the losses."""
    losses = []
    for step in steps:
        tokens = batch_of(step)

        def closure(tokens: Tensor = tokens) -> Tensor:
            loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())  # type: ignore[union-attr, arg-type]
        optimizer.zero_grad()
        strategy.run_events(step, model, optimizer)
        if after is not None:
            after(step)
    return losses


ADALORA = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 12, "orth_reg_weight": 0.1}
METHODS = [
    Method("lora", weights("lora.LoRA", rank=3)),
    Method("lora_rs_dropout", weights("lora.LoRA", rank=3, rslora=True, dropout=0.2), same_in_training=False),
    Method("lora_fa", weights("lora.LoRA", rank=3, train_a=False)),
    Method("lora_plus", weights("lora.LoRA", rank=3, lr_ratio_b=16.0)),
    Method("pissa", weights("lora.LoRA", rank=3, init="pissa", rounding="compensated")),
    Method("olora", weights("lora.LoRA", rank=3, init="olora", rounding="compensated")),
    Method(
        "relora",
        weights("lora.LoRA", rank=3, rounding="compensated"),
        merge={"every": 4, "moments": "magnitude", "share": 0.8},
    ),
    Method(
        "relora_published",
        weights("lora.LoRA", rank=3, rounding="stochastic"),
        merge={"every": 4, "delay": 1, "moments": "random", "share": 0.9},
    ),
    Method(
        "relora_warm_start",
        weights("lora.LoRA", rank=3, rounding="compensated", warm_start_steps=3, lr_ratio_b=4.0),
        merge={"every": 4},
    ),
    Method("sst", weights("sst.SST", rank=3, iteration_steps=3, iterations_per_round=2)),
    Method("sst_plain_gradient", weights("sst.SST", rank=8, iteration_steps=4, enhanced_gradient=False)),
    Method("lowrank", weights("factorised.LowRank", rank=6, frobenius_decay=0.1), keeps_weight=False),
    Method("lowrank_variance", weights("factorised.LowRank", rank=4, init="variance"), keeps_weight=False),
    Method("lowrank_naive", weights("factorised.LowRank", rank=4, init="naive"), keeps_weight=False),
    Method("lowrank_zero_b", weights("factorised.LowRank", rank=4, init="zero_b"), keeps_weight=False),
    Method("lowrank_guided", weights("factorised.LowRank", rank=6, guided_steps=7), keeps_weight=False),
    Method("block_dense", weights("structured.BlockDense", rank=8, blocks=4, guided_steps=5), keeps_weight=False),
    Method("block_shuffle", weights("structured.BlockShuffle", blocks=4, guided_steps=5), keeps_weight=False),
    Method("dora", weights("dora.DoRA", rank=3)),
    Method("dora_dropout_plus", weights("dora.DoRA", rank=3, dropout=0.2, lr_ratio_b=4.0), same_in_training=False),
    Method(
        "dora_pissa_merged",
        weights("dora.DoRA", rank=3, init="pissa", rounding="compensated", warm_start_steps=2),
        merge={"every": 4},
    ),
    Method("fedpara", weights("loha.FedPara", rank=2), keeps_weight=False),
    Method("loha", weights("loha.LoHa", rank=2, alpha=4.0)),
    Method("loha_merged", weights("loha.LoHa", rank=2, alpha=4.0, rounding="compensated"), merge={"every": 4}),
    Method("mora", weights("mora.MoRA", rank=3)),
    Method("mora_rotation", weights("mora.MoRA", rank=1, operator="rotation")),
    Method("remora", weights("mora.MoRA", rank=3, rounding="compensated"), merge={"every": 4}),
    Method("lora_xs", weights("three_factors.LoRAXS", rank=3), keeps_weight=False),  # C begins near 0, not at 0
    Method("curlora", weights("three_factors.CURLoRA", rank=3)),
    Method("svfit", weights("three_factors.SVFit", rank=3, rounding="compensated")),
    Method("sorsa", weights("three_factors.SORSA", rank=3, alpha=6.0, rounding="compensated")),
    Method("loldu", weights("three_factors.LoLDU", rank=3, alpha=3.0, rounding="compensated")),
    Method("allora", weights("allora.ALLoRA", rank=3)),
    Method(
        "allora_merged",
        weights("allora.ALLoRA", rank=3, init="pissa", rounding="compensated", warm_start_steps=2),
        merge={"every": 4},
    ),
    Method("lamda", weights("lamda.LaMDA", rank=3, freeze_steps=8, stages=2, rounding="compensated")),
    Method("lamda_random", weights("lamda.LaMDA", rank=3, init="random", freeze_steps=3, stages=3)),
    Method("lora_ggpo", weights("lora_ggpo.LoRAGGPO", rank=3, beta=0.1), same_in_training=False),
    Method(
        "lora_ggpo_merged",
        weights("lora_ggpo.LoRAGGPO", rank=3, rounding="compensated", warm_start_steps=2),
        merge={"every": 4},
        same_in_training=False,
    ),
    Method("moslora", weights("between.MoSLoRA", rank=3)),
    Method("moslora_merged", weights("between.MoSLoRA", rank=3, rounding="compensated"), merge={"every": 4}),
    Method("sora", weights("between.SoRA", rank=3, threshold=0.01)),
    Method(
        "sora_merged",
        weights("between.SoRA", rank=3, threshold=0.1, rounding="compensated", warm_start_steps=2),
        merge={"every": 4},
    ),
    Method("melora", weights("patterned_lora.MELoRA", rank=2, minis=4)),
    Method("capaboost", weights("patterned_lora.CapaBoost", rank=3, copies=3)),
    Method("dylora", weights("dylora.DyLoRA", rank=4), same_in_training=False),
    Method("dylora_frozen", weights("dylora.DyLoRA", rank=4, frozen=True, used_rank=3), same_in_training=False),
    Method("lora_pro", weights("lora_pro.LoRAPro", rank=3)),
    Method("lora_sb", weights("lora_sb.LoRASB", rank=3)),
    Method("lora_ga", weights("lora_from_data.LoRAGA", rank=3, watched_updates=2, rounding="compensated")),
    Method("lora_ga_merged", weights("lora_from_data.LoRAGA", rank=2, rounding="compensated"), merge={"every": 4}),
    Method("eva", weights("lora_from_data.EVA", rank=3, watched_updates=2)),
    Method("pmss", weights("from_columns.PMSS", rank=3)),
    Method("nlora", weights("from_columns.NLoRA", rank=3, rounding="compensated")),
    Method("inttune", weights("from_columns.IntTune", rank=3, rounding="compensated")),
    Method("nora", weights("nested_lora.NoRA", rank=2, outer_rank=5)),
    Method("lora_mini", weights("nested_lora.LoRAMini", rank=2, outer_rank=5)),
    Method("welore", weights("welore.WeLore", rank_reduction=0.6), keeps_weight=False, same_on_meta=False),
    Method("o_lora", weights("o_lora.OLoRA", rank=3)),
    Method("nola", weights("nola.NOLA", rank=3, bases=30)),
    Method("cola", weights("lora.LoRA", rank=3, rounding="compensated"), merge={"every": 6, "moments": "fresh"}),
    Method(
        "lte",
        weights("parallel_heads.ParallelHeads", heads=2, rank=3, alpha=6.0, rounding="compensated"),
        merge={"every": 4, "moments": "keep"},
        same_in_training=False,
    ),
    Method(
        "slope",
        weights("slope.SLoPe", rank=2, mask_change_every=3, lazy_after_steps=5),
        keeps_weight=False,
    ),
    Method(
        "cuttlefish",
        weights(
            "cuttlefish.Cuttlefish",
            evaluate_every=1,
            earliest_evaluation=4,
            window=3,
            latest_steps=20,
            threshold=0.1,
            scaled=False,
            frobenius_decay=0.1,
        ),
    ),
    Method(
        "cuttlefish_at_the_latest", weights("cuttlefish.Cuttlefish", evaluate_every=2, latest_steps=7, scaled=False)
    ),
    Method("trp", weights("trp.TRP", every=4, nuclear=0.1)),
    Method("dlrt", weights("dlrt.DLRT", rank=3, theta=0.5), keeps_weight=False),
    Method("dlrt_fixed_rank", weights("dlrt.DLRT", rank=5, theta=None), keeps_weight=False),
    Method(
        "maestro",
        weights("maestro.Maestro", penalty=0.2, eps=0.3, shrink_every=4),
        same_in_training=False,
    ),
    Method("int8", weights("int8.Int8", group=32), keeps_weight=False),
    Method("sltrain", weights("sltrain.SLTrain", rank=3, sp_ratio=0.1), keeps_weight=False),
    Method(
        "sltrain_scaling",
        weights("sltrain.SLTrain", rank=3, sp_ratio=0.2, trainable_scaling=True),
        keeps_weight=False,
    ),
    Method("peft_vera", weights("peft.Peft", type="VERA", options={"r": 16, "d_initial": 1.0})),
    Method(
        "peft_vb_lora",
        weights("peft.Peft", type="VBLORA", options={"num_vectors": 8, "vector_length": 4}),
        keeps_weight=False,  # PEFT starts both factors at random
    ),
    Method("peft_randlora", weights("peft.Peft", type="RANDLORA", options={"r": 4, "randlora_alpha": 80})),
    Method("peft_hra", weights("peft.Peft", type="HRA", options={"r": 4})),
    Method("peft_miss", weights("peft.Peft", type="MISS", options={"r": 4})),
    Method("peft_qlora", weights("peft.Peft", base="nf4", options={"r": 4}), keeps_weight=False),
    Method("peft_adalora", weights("peft.Peft", type="ADALORA", options=ADALORA)),
]
