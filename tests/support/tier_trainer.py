"""A small FSDP2 job for tests of tiers: `torchrun tier_trainer.py FIRST_STEP LAST_STEP RESULT [plain]`.

Trains up to LAST_STEP, from FIRST_STEP as a restore must give it, waits until that is durable, and ends at once.
RESULT gets the losses by step, and a hash of each rank's state. `plain`: without snapd.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from snapd_client import Snapshotter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def fingerprint(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    digest = hashlib.sha256()
    tensors = [*model.state_dict().values()]
    tensors += [
        t for fields in optimizer.state.values() for t in fields.values() if isinstance(t, torch.Tensor)
    ]
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def main(first: int, last: int, result: Path, *, is_plain: bool) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(11)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(48, 96), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(96, 48)
    )
    fully_shard(model)
    torch.manual_seed(100 + dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    snap = None
    if not is_plain:
        snap = Snapshotter({"model": model, "optimizer": optimizer}, job="lost", strict=True)
        start = snap.restore()
        assert start == first, (start, first)
    losses: dict[int, float] = {}
    for step in range(first, last):
        batch = torch.randn(16, 48)
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = loss.item()
        if snap is not None:
            snap.step(step + 1, wait="captured")
    found = {"losses": losses, "fingerprint": fingerprint(model, optimizer)}
    result.with_suffix(f".rank{dist.get_rank()}.json").write_text(json.dumps(found))
    if snap is not None:
        assert snap.wait("durable", timeout=60) == "durable"
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), is_plain="plain" in sys.argv[4:])
