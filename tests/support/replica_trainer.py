"""A world of two ranks with replicas: `torchrun ... replica_trainer.py before|after FOLDER`.

`before` trains each way once undisturbed and writes down the result, then again with a Snapshotter up to the cut, and
kills itself. One of the ways is disturbed by hand: a parameter of rank 1 is changed while captures are shared out.
`after` restores each, compares, and goes on to the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from snapd_client import Snapshotter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

CUT, END, DISTURBED_AT = 36, 40, 12
SPOILT = "model.module.2.weight"


def _hybrid(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return model


def _adapted(model: Any) -> nn.Module:
    """Most of it is frozen: its chunks are named instead of copied, in either layout."""
    model[2].requires_grad_(False)
    return DistributedDataParallel(model)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicas-ddp": DistributedDataParallel,
    "replicas-hsdp": _hybrid,
    "replicas-frozen": _adapted,
    "replicas-spoilt": DistributedDataParallel,
}


class Run:
    """Each rank draws its own data and its own dropout; parameters start alike."""

    def __init__(self, way: str, seed: int) -> None:
        torch.manual_seed(seed)
        layers = (
            nn.Linear(128, 256), nn.BatchNorm1d(256), nn.Linear(256, 256), nn.Dropout(0.2), nn.Linear(256, 128)
        )  # fmt: skip
        self.model = WAYS[way](nn.Sequential(*layers))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        torch.manual_seed(seed * 10 + dist.get_rank())

    def step(self) -> None:
        self.model(torch.randn(8, 128)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Under the names that an export gives them."""
        found = {f"model.{name}": tensor for name, tensor in self.model.named_parameters()}
        found.update({f"model.{name}": tensor for name, tensor in self.model.named_buffers()})
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, fields in self.optimizer.state.items():
            start = f"optimizer.state.model.{names[parameter]}"
            found.update({f"{start}.{field}": tensor for field, tensor in fields.items()})
        return {
            name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone()
            for name, t in found.items()
        }

    def digests(self) -> dict[str, str]:
        found = {**self.tensors(), "rng": torch.get_rng_state()}
        return {
            name: hashlib.sha1(tensor.contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in found.items()
        }


def _write(folder: Path, way: str, what: str, value: Any) -> None:
    (folder / f"{way}.{what}.rank{dist.get_rank()}.json").write_text(json.dumps(value))


def _read(folder: Path, way: str, what: str) -> Any:
    return json.loads((folder / f"{way}.{what}.rank{dist.get_rank()}.json").read_text())


def before(folder: Path) -> None:
    keep = []
    for way in WAYS:
        run = Run(way, 1)
        for _ in range(END):
            run.step()
        _write(folder, way, "end", run.digests())
        run = Run(way, 1)
        snap = Snapshotter({"model": run.model, "optimizer": run.optimizer}, job=way, strict=True)
        assert snap.restore() == 0
        seen = []
        for step in range(1, CUT + 1):
            if way == "replicas-spoilt" and step == DISTURBED_AT and dist.get_rank() == 1:
                with torch.no_grad():
                    run.model.module[2].weight[3, 5] += 0.25
            run.step()
            snap.step(step, wait="captured")
            facts = snap.health()
            seen.append({"step": step, "replicas": facts["replicas"], "bytes": facts["lazy_bytes"]})
            assert facts["skipped"] == facts["discarded"] == 0
            time.sleep(0.02)  # for the comparison, which nobody waits for
        _write(folder, way, "seen", seen)
        _write(folder, way, "difference", snap.health()["replica_difference"])
        _write(folder, way, "cut", run.digests())
        torch.save(run.tensors(), folder / f"{way}.rank{dist.get_rank()}.pt")
        keep.append((run, snap))
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def after(folder: Path) -> None:
    for way in WAYS:
        run = Run(way, 2)
        snap = Snapshotter({"model": run.model, "optimizer": run.optimizer}, job=way, strict=True)
        start = snap.restore()
        restored = run.digests()
        for step in range(start, END):
            run.step()
            snap.step(step + 1)
            snap.wait("captured")
            time.sleep(0.02)
        ended, last = run.digests(), snap.health()["replicas"]
        run.step()
        found = {"start": start, "last": last, "rolled_back_to": snap.rollback()}
        for name, what, digests in (
            ("cut", "cut", restored),
            ("end", "end", ended),
            ("rolled_back", "end", run.digests()),
        ):
            expected = _read(folder, way, what)
            assert expected.keys() == digests.keys()
            found[name] = [key for key in expected if expected[key] != digests[key]]
        _write(folder, way, "after", found)
        dist.barrier()
        snap.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    {"before": before, "after": after}[sys.argv[1]](Path(sys.argv[2]))
    dist.destroy_process_group()
