"""O-LoRA: a LoRA for a new task, kept orthogonal to the adapters of the tasks before it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lowrank_train.config.errors import UserError
from lowrank_train.nn.as_lora import factors_of, lora_options, lora_tensors
from lowrank_train.nn.events import Event, each
from lowrank_train.nn.lora import LoRA, LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear
from lowrank_train.nn.rounding import add_

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass
class OLoRA(LoRA):
    """W = W0 + sum of s_i B_i A_i + s B A over the earlier tasks i, A and B trained (Wang et al., arXiv 2310.14152).

    `previous` names the adapters of the earlier tasks, folders of PEFT's LoRA such as `lowrank export adapter=true`
    writes. After every update A <- A - lr orthogonal sign(A A_i^T) A_i, the subgradient of the paper's penalty
    orthogonal * sum |A A_i^T|, decoupled from the rule as weight decay is; the published code adds it to the loss.
    """

    previous: list[str] = field(default_factory=list)
    orthogonal: float = 0.5  # lambda_1; the published scripts have 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orthogonal < 0:
            raise ValueError(f"strategy.weights.orthogonal is {self.orthogonal}; it must be at least 0")
        for folder in self.previous:
            for name in (CONFIG_FILE, TENSORS_FILE):
                if not (Path(folder) / name).is_file():
                    raise ValueError(
                        f"strategy.weights.previous: {folder} has no {name}; name folders of LoRA adapters, such as "
                        "lowrank export adapter=true writes"
                    )
            kind = read_config(folder).get("peft_type")
            if kind != "LORA":
                raise ValueError(f"strategy.weights.previous: {folder} is an adapter of type {kind}, not a LORA")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return OLoRALinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        if not self.previous:
            return super().as_peft()
        rank = self.rank + sum(int(read_config(folder)["r"]) for folder in self.previous)
        return lora_options(rank, 1.0)

    def events(self) -> Sequence[Event]:
        pull = each(OLoRALinear, lambda layer, number, moments: layer.pull_(moments.lr(layer.A) * self.orthogonal))
        return (*super().events(), *([Event("pull to orthogonal", pull, 1, 1, quiet=True)] if self.previous else ()))


class OLoRALinear(LoRALinear):
    """A LoRALinear over W0 and the earlier adapters; `previous_A` (sum of their ranks, in_features) holds their A."""

    choice = OLoRA
    weights: OLoRA

    def __init__(self, linear: nn.Linear, weights: OLoRA, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        weight = self.weight
        earlier = [(read_config(folder), *read_factors(folder, origin.name)) for folder in weights.previous]
        self.previous_A: Tensor
        rows = [first.to(weight.device, weight.dtype) for _, first, _ in earlier]
        self.register_buffer("previous_A", torch.cat([weight.new_zeros(0, self.in_features), *rows]))
        for config, first, second in [] if weight.is_meta else earlier:
            scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
            update = scale * (second.to(weight.device).double() @ first.to(weight.device).double())
            with torch.no_grad():
                wide = torch.promote_types(weight.dtype, torch.float32)
                add_(weight, update.to(wide), weights.rounding, self.residue, origin, 0)

    @torch.no_grad()
    def pull_(self, share: float) -> None:
        """A <- A - share sign(A A_i^T) A_i."""
        self.A.sub_(share * (self.A @ self.previous_A.T).sign() @ self.previous_A)

    @torch.no_grad()
    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        if not self.weights.previous:
            return super().adapter_tensors(base)
        change = self.dense_weight() - base.to(self.kept_weight().dtype)
        return lora_tensors(*factors_of(change, self.weights.as_peft()[1]["r"]))


def read_config(folder: str) -> dict[str, Any]:
    """The adapter's adapter_config.json."""
    return dict(json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8")))


def read_factors(folder: str, layer: str) -> tuple[Tensor, Tensor]:
    """A (rank, in_features) and B (out_features, rank) of one layer. UserError where the adapter has none."""
    with safe_open(Path(folder) / TENSORS_FILE, framework="pt") as file:
        names = [f"{PREFIX}{layer}.lora_{factor}.weight" for factor in "AB"]
        if not set(names) <= set(file.keys()):
            raise UserError(f"strategy.weights.previous: {folder} has no LoRA for {layer}; use the same modules")
        first, second = (file.get_tensor(name) for name in names)
    return first, second
