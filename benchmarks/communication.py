"""Bytes handed to collectives in an update of DDP: whole gradients beside projected ones (trainer.reduce=projected).

    .venv/bin/python -m benchmarks.communication

Two gloo processes train LLaMA 60M with GaLore at rank 128 for two updates, on rows of a few tokens: what is averaged
does not depend on their number. Counted is the payload of every all-reduce and broadcast of one rank, for torch's DDP
in its communication hook. At the first update all bases are due, so that gradients go whole and bases are sent; at the
second none is. `mean_mb` is over the 200 updates from one move to the next, all bases moving at once. GaLore leaves
embedding and head whole, which are 56 % of the parameters of this model; `selected` says what is projected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rows import write_rows
from lowrank_train.config import compose
from lowrank_train.models import build_model, causal_loss
from lowrank_train.optim.ranks import Together
from lowrank_train.strategy import Strategy

RANKS, EVERY = 2, 200
SELECTED = {
    "attention and MLP": ["*.self_attn.*.weight", "*.mlp.*.weight"],
    "and embedding and head": ["*.self_attn.*.weight", "*.mlp.*.weight", "*embed_tokens.weight", "lm_head.weight"],
}


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes handed to all_reduce and broadcast within, by name."""
    found = {"all_reduce": 0, "broadcast": 0}
    plain = {name: getattr(dist, name) for name in found}

    def counting(name: str) -> Any:
        def call(tensor: Tensor, *more: Any, **named: Any) -> Any:
            found[name] += tensor.numel() * tensor.element_size()
            return plain[name](tensor, *more, **named)

        return call

    for name in found:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def bytes_of_updates(model_name: str, rank: int, select: list[str], projected: bool) -> list[int]:
    """The payload of two updates, as this process sees it."""
    words = [f"model={model_name}", "strategy=galore", "task=explain", f"strategy.subspace.rank={rank}"]
    config = compose([*words, f"strategy.subspace.every={EVERY}", f"strategy.select={json.dumps(select)}"])
    assert config.model.vocab_size is not None
    model = build_model(
        config.model, vocab_size=config.model.vocab_size, dtype=torch.float32, device="cpu", seed=config.seed
    )
    strategy = Strategy.from_config(config.strategy)
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=1e-3)
    optimizer.ranks = Together("projected" if projected else "before")
    module: Any = model
    by_ddp = 0
    if not projected:
        module, world = DistributedDataParallel(model), dist.group.WORLD
        assert world is not None

        def average(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            nonlocal by_ddp
            by_ddp += bucket.buffer().numel() * bucket.buffer().element_size()
            return allreduce_hook(world, bucket)

        module.register_comm_hook(None, lambda state, bucket: average(bucket))  # annotations as text are refused
    totals = []
    for update in range(2):
        tokens = torch.randint(model.vocab_size, (1, 8), generator=torch.Generator().manual_seed(update))
        with counted() as found:
            by_ddp = 0
            optimizer.zero_grad()
            optimizer.step(lambda tokens=tokens: loss_of(module, tokens).backward())
            totals.append(by_ddp + (sum(found.values()) if projected else found["broadcast"]))
    return totals


def loss_of(module: Any, tokens: Tensor) -> Tensor:
    loss, _ = causal_loss(module, {"input_ids": tokens, "labels": tokens}, chunk_tokens=0)
    return loss


def rows(model: str, rank: int) -> Iterator[dict[str, Any]]:
    """Plain and projected updates for each selection; each process measures, and all find the same."""
    for selected, select in SELECTED.items():
        plain = bytes_of_updates(model, rank, select, projected=False)[1]
        due, rest = bytes_of_updates(model, rank, select, projected=True)
        mean = (due + (EVERY - 1) * rest) / EVERY
        yield {
            "model": model,
            "rank": rank,
            "selected": selected,
            "plain_mb": round(plain / 1e6, 2),
            "projected_mb": round(rest / 1e6, 2),
            "with_moves_mb": round(due / 1e6, 2),
            "mean_mb": round(mean / 1e6, 2),
            "projected_over_plain": round(rest / plain, 3),
            "mean_over_plain": round(mean / plain, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--process", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process is not None:
        meeting = f"file://{arguments.folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=arguments.process, world_size=RANKS)
        found = list(rows(arguments.model, arguments.rank))
        if arguments.process == 0:
            (arguments.folder / "rows.json").write_text(json.dumps(found), encoding="utf-8")
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.communication", "--model", arguments.model]
        command += ["--rank", str(arguments.rank), "--folder", folder]
        started = [subprocess.Popen([*command, "--process", str(number)]) for number in range(RANKS)]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(1)
        found = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    table = Table(*found[0])
    for row in found:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    print(f"saved to {write_rows('communication', found)}")


if __name__ == "__main__":
    main()
