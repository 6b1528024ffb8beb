"""Two ranks and one take the same step: each scores its share of the rows, the mean is over all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from omni_rollout.config import TrainerConfig
from omni_rollout.policy.trainer_engines import make_trainer_engine

ROWS = torch.linspace(-1, 1, 5)[:, None] * torch.tensor([1.0, 2.0, -3.0])


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def run(rank: int, ranks: int, folder: Path, rows: int) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    module = network()
    engine = make_trainer_engine(TrainerConfig(ranks=ranks, learning_rate=0.1), module, list(module.parameters()))
    norms = []
    for _ in range(3):
        mine = list(range(rows))[rank::ranks]
        for number, row in enumerate(mine):
            engine.backward(module(ROWS[row]).square().sum() / rows, last=number == len(mine) - 1)
        norms.append(engine.step(0.1))
    torch.save({"weight": module.weight.detach(), "norms": torch.tensor(norms)}, folder / f"{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def outcome(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def check(folder: Path, rows: int) -> None:
    run(0, 1, folder, rows)
    command = [sys.executable, __file__, str(folder), str(rows)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    single, first, second = (outcome(folder, name) for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first["weight"], second["weight"]) and torch.equal(first["norms"], second["norms"])
    torch.testing.assert_close(first["norms"], single["norms"], rtol=1e-6, atol=0)
    torch.testing.assert_close(first["weight"], single["weight"], rtol=1e-6, atol=1e-7)
    assert not torch.equal(single["weight"], network().weight)


def test_shares_of_different_sizes(tmp_path):
    check(tmp_path, rows=5)


def test_a_rank_without_rows(tmp_path):
    check(tmp_path, rows=1)


if __name__ == "__main__":
    run(int(sys.argv[3]), 2, Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # Python's own end may stop gloo's thread in the middle of freeing a tensor: SIGABRT (torch 2.13)
