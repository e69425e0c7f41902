"""A trainer for the test of exports: two ranks, FSDP2, odd tensors; keeps what it has for comparison.

Usage: torchrun --nproc-per-node 2 export_trainer.py FOLDER
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from snapd_client import Snapshotter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

STEPS = 3


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 48))
    model[2].bias.requires_grad_(False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    table = torch.arange(600, dtype=torch.float32).reshape(20, 30) + rank
    shared = [1, [2.5, None]]
    odd = {
        "table": table,
        "transposed": table.t(),
        "column": table[:, 7],
        "fp8": torch.randn(33).to(torch.float8_e4m3fn),
        "bf16": torch.randn(5, 7, dtype=torch.bfloat16),
        "complex": torch.randn(3, dtype=torch.complex128),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1 << 40),
    }
    plain = {
        "a": shared,
        "b": shared,
        "nan": float("nan"),
        ("tuple", 1): b"\x00\xff",
        "queue": collections.deque([1, 2], maxlen=4),
    }
    state = {"model": model, "optimizer": optimizer, "odd": odd, "plain": plain}
    snap = Snapshotter(state, job="export")
    assert snap.restore() == 0
    for step in range(STEPS):
        model(torch.randn(8, 48)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        plain["step"] = step
        snap.step(step + 1, wait="captured")
    torch.save(_reference(model, optimizer, odd), folder / f"reference-{rank}.pt")
    dist.barrier()
    snap.close()
    dist.destroy_process_group()


def _reference(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, odd: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Exported name -> the local tensor that this rank has."""
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, fields in optimizer.state.items():
        found.update({f"optimizer.state.model.{names[parameter]}.{field}": t for field, t in fields.items()})
    found.update({f"odd.{name}": tensor for name, tensor in odd.items()})
    return {name: (t.to_local() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
