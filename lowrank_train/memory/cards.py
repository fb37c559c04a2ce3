"""Cards by the names people use, with the memory torch can have on them, and what a process takes besides tensors."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_train.config.errors import UserError
from lowrank_train.config.suggest import nearest
from lowrank_train.memory.devices import peak_bf16_flops

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card, or a plain budget of bytes."""

    name: str
    usable_bytes: int  # what torch prints as the total capacity in an out-of-memory message; the rest is the driver's
    device_name: str | None  # as torch.cuda.get_device_name gives it; None: a budget

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s; None where it is not known."""
        return None if self.device_name is None else peak_bf16_flops(self.device_name)


def _card(name: str, gib: float, device_name: str) -> Card:
    return Card(name, int(gib * GIB), device_name)


# Where torch's message for a card is at hand, the lowest capacity that it gives; it differs between drivers by up to
# 0.7 %. Where none is, 98 % of the nominal size, the smallest share among the cards with a message that keep no check
# bits in their memory (RTX 4090, RTX 5090), or the figure of a sister card.
CARDS = (
    _card("a10", 21.99, "NVIDIA A10"),  # message in CogVLM issue 236
    _card("a10g", 21.99, "NVIDIA A10G"),  # as the A10
    _card("l4", 21.95, "NVIDIA L4"),  # 22,888 MiB in EC2's DescribeInstanceTypes, less 2 % for the driver
    _card("3090", 23.52, "NVIDIA GeForce RTX 3090"),  # as the RTX 4090
    _card("3090ti", 23.52, "NVIDIA GeForce RTX 3090 Ti"),  # as the RTX 4090
    _card("4080", 15.68, "NVIDIA GeForce RTX 4080"),  # 98 % of 16 GiB
    _card("4090", 23.52, "NVIDIA GeForce RTX 4090"),  # messages in torchchat issue 1341 and others: 23.52 to 23.68
    _card("a30", 23.52, "NVIDIA A30"),  # message in RB-Modulation issue 5: 23.53
    _card("5090", 31.36, "NVIDIA GeForce RTX 5090"),  # message in TrajectoryCrafter issue 20
    _card("a40", 44.39, "NVIDIA A40"),  # as the L40
    _card("a6000", 44.39, "NVIDIA RTX A6000"),  # as the L40, with error correction on
    _card("l40", 44.39, "NVIDIA L40"),  # message in Qwen3-VL issue 2097: 44.40
    _card("l40s", 44.39, "NVIDIA L40S"),  # as the L40
    _card("a100_40gb", 39.20, "NVIDIA A100-SXM4-40GB"),  # 98 %; message in CoSeR issue 10: 39.50
    _card("a100_80gb", 78.40, "NVIDIA A100-SXM4-80GB"),  # 98 %; message in OOTDiffusion issue 235: 79.25
    _card("h100", 78.40, "NVIDIA H100 80GB HBM3"),  # 98 % of 80 GiB
    _card("h200", 138.0, "NVIDIA H200"),  # 98 % of 141 GiB
)

CONTEXT_BYTES = 600_000_000
"""A process's CUDA context and loaded kernels: 0.44 to 0.50 GiB in the messages above (what the process has in use less
what torch has reserved), rounded up."""
WORKSPACE_BYTES = 2 * 33_554_432
"""cuBLAS's workspace, 32 MiB on Hopper and 8 elsewhere (torch's documentation of CUBLAS_WORKSPACE_CONFIG), once for the
forward pass's thread and once for that of the backward pass."""
FRAGMENTATION = 0.02
"""Share of the peak that torch's allocator holds and cannot use, an assumption: 0.05 to 1 % in the messages above of
processes that had filled their card; expandable segments, which `lowrank` turns on, keep it low."""


def allowances(peak_bytes: int, bucket_bytes: int) -> dict[str, int]:
    """What a process needs beyond the tensors of its model, by name; `bucket_bytes`: of gradients to be sent."""
    found = {
        "CUDA context": CONTEXT_BYTES,
        "cuBLAS workspace": WORKSPACE_BYTES,
        "fragmentation": round(FRAGMENTATION * peak_bytes),
    }
    return found | ({"gradient buckets": bucket_bytes} if bucket_bytes else {})


def chosen_card(card: str | None, budget_gb: float | None) -> Card | None:
    """The card, or the budget, that the plan is for; None where neither is given. UserError for an unknown card."""
    if card is not None and budget_gb is not None:
        raise UserError("card and budget_gb are both given; leave out one of the two")
    if budget_gb is not None:
        return Card(f"budget of {budget_gb:g} GB", int(budget_gb * GB), None)
    if card is None:
        return None
    names = {item.name: item for item in CARDS}
    word = "".join(letter for letter in card.lower() if letter.isalnum() or letter == "_")
    word = word.removeprefix("nvidia").removeprefix("geforce").removeprefix("rtx").strip("_")
    if word not in names:
        close = nearest(word, names)
        hint = f" Did you mean {close}?" if close else ""
        raise UserError(f"card={card}: no such card.{hint} Cards: {', '.join(names)}; or give budget_gb.")
    return names[word]
