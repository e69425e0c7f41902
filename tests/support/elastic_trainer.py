"""One rank of a job whose number of ranks, and whose way to cut the model, change from start to start. By torchrun:

    elastic_trainer.py KIND FOLDER STEPS [RESHARD]

Restores, compares the whole state with what the start before left in FOLDER, trains STEPS more, leaves the whole state
there again, and is killed with SIGKILL. RESHARD: "keep" or "function" for the loader; nothing: no loader.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from snapd_client import Snapshotter
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.support.elastic_runner import contents, make, train

SAMPLES, BATCH = 96, 4


def loader_of(world: int) -> StatefulDataLoader:
    return StatefulDataLoader(list(range(SAMPLES)), batch_size=BATCH, shuffle=False)


def seen_by_all(states: list[Any], rank: int, world_size: int) -> Any:
    """Each rank goes on where all saved ranks together came to, shared out anew."""
    batches = sum(state["_num_yielded"] for state in states) // world_size
    loader = loader_of(world_size)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    return loader.state_dict()


def main() -> None:
    kind, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    how = sys.argv[4] if len(sys.argv) > 4 else ""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make(kind, seed=rank + 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if how:
        state["data"] = loader_of(world)
    snap = Snapshotter(state, job="elastic", interval=1)
    reshard: dict[str, Any] = {"data": seen_by_all if how == "function" else "keep"} if how else {}
    if how == "refused":
        reshard = {}
    start = snap.restore(reshard=reshard)
    whole = folder / "whole.safetensors"
    expected = load_file(whole) if whole.exists() else {}
    found = contents(model, optimizer) if expected else {}
    bad = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    assert not bad, bad
    draws = torch.rand(1).item()
    first = next(iter(state["data"]))[0].item() if how else -1
    said = {"rank": rank, "world": world, "step": start, "draw": draws, "first": first}
    (folder / f"said-{os.environ['TORCHELASTIC_RUN_ID']}-{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    for step in range(start, start + steps):
        train(model, optimizer, 1)
        snap.step(step + 1)
    snap.wait(os.environ.get("ELASTIC_LEVEL", "captured"), timeout=120.0)
    found = contents(model, optimizer)
    dist.barrier()
    if rank == 0:
        save_file(found, whole)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
