"""The training that is measured: a decoder-only transformer with real compute, one or several ranks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import torch
import torch.distributed as dist
from model import Shape, Transformer

SIZES = {
    # tokens: (batch, length) of one step of one rank
    "tiny": (
        Shape(vocabulary=1024, width=128, layers=2, heads=4, context=32, dropout=0.0),
        (2, 32),
    ),  # 0.5 M parameters
    "small": (Shape(vocabulary=8192, width=512, layers=8, heads=8, context=96, dropout=0.0), (2, 96)),  # 30 M
    "medium": (
        Shape(vocabulary=50257, width=768, layers=12, heads=12, context=96, dropout=0.0),
        (1, 48),
    ),  # 124 M
}


def now() -> float:
    return time.perf_counter()


class Workload:
    """Model, AdamW with existing state, and a step. Several ranks: FSDP2 over gloo (under torchrun)."""

    def __init__(self, size: str, *, seed: int = 1, with_state: bool = True) -> None:
        torch.set_num_threads(1)
        shape, self._tokens = SIZES[size]
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        torch.manual_seed(seed)
        self.model = Transformer(shape)
        if self.world_size > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (self.world_size,))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        fused = self.world_size == 1
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, fused=fused, foreach=None if fused else False
        )
        self.vocabulary = shape.vocabulary
        self.steps_done = 0
        if with_state:
            self.step()

    def state(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer}

    def flat(self) -> dict[str, torch.Tensor]:
        """Name -> this rank's live tensor: parameters and optimizer state."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        return {name: t.to_local() if hasattr(t, "to_local") else t for name, t in found.items()}

    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.flat().values())

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def compute(self) -> None:
        """Forward and backward of the next step, on tokens that follow from the step's number."""
        batch, length = self._tokens
        generator = torch.Generator().manual_seed(self.steps_done * 1000 + self.rank)
        tokens = torch.randint(0, self.vocabulary, (batch, length + 1), generator=generator)
        self.model(tokens[:, :-1], tokens[:, 1:]).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def step(self) -> float:
        """One whole step; its seconds."""
        began = now()
        self.compute()
        self.update()
        return now() - began

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


class Memcpy:
    """One thread copies the whole state into memory that is backed: the unit of everything here."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._into = {name: torch.empty_like(t).fill_(0) for name, t in workload.flat().items()}

    def __call__(self) -> float:
        """Seconds. All ranks copy at the same time."""
        self._workload.barrier()
        live = self._workload.flat()
        began = now()
        for name, target in self._into.items():
            target.copy_(live[name])
        return now() - began


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int | str = "self") -> float:
    """User and system time of a process, all threads."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_cpu_seconds(prefix: str) -> float:
    """User and system time of this process's threads whose names begin with `prefix`."""
    total = 0.0
    for task in Path("/proc/self/task").iterdir():
        text = (task / "stat").read_text()
        if text[text.index("(") + 1 :].startswith(prefix):
            fields = text[text.rindex(")") + 2 :].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
