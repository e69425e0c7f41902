"""One rank that saves its shard to a folder, or restores from all shards there, cut its own way. Run by torchrun:

    elastic_runner.py save:KIND:FOLDER|load:KIND:FOLDER|trained:KIND:FOLDER ...

KIND says how the model is cut: plain, ddp, fsdp, hsdp (2 x n), tp (fsdp x tensor parallel of 2). `trained` restores
into a state that is there already. Several are done one after the other: starting a world is what costs.
"""

from __future__ import annotations

import json
import sys
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from snapd_client.state.apply import prepare_restore
from snapd_client.state.layouts import Layouts
from snapd_client.state.resharding import Elastic
from snapd_native import CopyPlan
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.support.leaving import leave_together
from tests.support.loopback import Loopback, Snapshot, make_tree

CHUNK_BYTES = 1024
FIELDS = ("chunk_bytes", "layout_nbytes", "early_values_offset", "early_values_nbytes")


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.up, self.down = nn.Linear(12, 14), nn.Linear(14, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.down(torch.relu(self.up(self.embedding(tokens)))))
        return result


def make(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, world = Net(), dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "plain":
        return model
    if kind == "tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        mesh = mesh["dp"]
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        loss = model(torch.randint(0, 50, (12,))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything, whole, by names that do not tell how it is wrapped."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("module.")
        found[plain] = whole(parameter).clone()
        for field, value in optimizer.state[parameter].items():
            found[f"{plain}/{field}"] = whole(value).clone()
    for name, buffer in model.named_buffers():
        found[f"buffer/{name.removeprefix('module.')}"] = buffer.clone()
    return found


def write(folder: Path, rank: int, snapshot: Snapshot) -> None:
    np.save(folder / f"{rank}.npy", snapshot.data)
    (folder / f"{rank}.json").write_text(json.dumps({name: getattr(snapshot, name) for name in FIELDS}))


def read(folder: Path) -> dict[int, Snapshot]:
    return {
        int(path.stem): Snapshot(np.load(path.with_suffix(".npy")), **json.loads(path.read_text()))
        for path in folder.glob("[0-9]*.json")
    }


def restore(tree: Any, shards: dict[int, Snapshot]) -> float:
    """As the client does it. Returns the share of the chunks that were read."""
    base = tree.rank % len(shards)
    pending = prepare_restore(
        tree,
        shards[base].layout,
        shards[base].early,
        elastic=Elastic(Layouts.given({rank: shard.layout for rank, shard in shards.items()})),
    )
    plan = CopyPlan(*pending.plan)
    bases = array("Q", [
        shards[rank].data.ctypes.data + chunk * CHUNK_BYTES for rank, chunk in pending.sources
    ])  # fmt: skip
    for first, count in pending.pieces_of_chunk:
        if count:
            plan.run(bases, pending.destinations, first, count)
    pending.finish()
    chunks = sum(len(shard.data) // CHUNK_BYTES for shard in shards.values())
    return sum(count > 0 for _, count in pending.pieces_of_chunk) / chunks


def do(mode: str, kind: str, folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make(kind, seed=1 if mode == "save" else 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tree = make_tree({"model": model, "optimizer": optimizer}, rank=rank, world_size=world)
    if mode == "save":
        train(model, optimizer, 3)
        write(folder, rank, Loopback(tree, chunk_bytes=CHUNK_BYTES).capture(3))
        found = contents(model, optimizer)
        if rank == 0:
            save_file(found, folder / "whole.safetensors")
        return
    if mode == "trained":
        train(model, optimizer, 1)
    share = restore(tree, read(folder))
    found, expected = contents(model, optimizer), load_file(folder / "whole.safetensors")
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    bad = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not bad, bad
    train(model, optimizer, 1)  # the optimizer takes its state as it is
    print(f"restored {mode}:{kind}:{folder.name} rank={rank} share={share:.3f};", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    for order in sys.argv[1:]:
        mode, kind, folder = order.split(":")
        do(mode, kind, Path(folder))
    leave_together()


if __name__ == "__main__":
    main()
