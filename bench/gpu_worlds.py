"""Ways to train on a device: a decoder-only transformer with everything random that a resume has to bring back.

Each world has dropout from the device's generator, a learning rate schedule, and batches that follow from the step's
number. Where torch has a deterministic way it is taken, so that two runs can be compared to the bit.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is loaded
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import torch
import torch.distributed as dist
from model import Shape, Transformer

SHAPES = {
    "small": Shape(
        vocabulary=4096, width=384, layers=6, heads=6, context=128, dropout=0.1
    ),  # 12 M parameters
    "large": Shape(vocabulary=32768, width=1024, layers=14, heads=16, context=1024, dropout=0.1),  # 211 M
}
KINDS = ("fused", "foreach", "bf16", "scaler", "eightbit", "ddp", "fsdp2", "compiled", "graph")


def join_world_of_one(device: str) -> None:
    """A process group of one rank; the port is one that was free."""
    if dist.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)


class World:
    """Model, optimizer and what belongs to them, in one of KINDS.

    Args:
        batch: sequences of the model's full context in one step.
    """

    def __init__(self, kind: str, size: str, *, batch: int, seed: int, device: str = "cuda") -> None:
        self.kind, self.device, self.batch, self.shape = kind, device, batch, SHAPES[size]
        torch.manual_seed(seed)
        model: torch.nn.Module = Transformer(self.shape).to(device)
        self.optimizer = self._optimizer(model)
        self.model = model
        self.call: Any = model
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**10) if kind == "scaler" else None
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: (n + 1) ** -0.5)
        self._graph: Any = None
        if kind == "compiled":
            self.call = torch.compile(model)
        if kind == "graph":
            self._capture()

    def _optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        kind = self.kind
        if kind == "bf16":
            model.to(torch.bfloat16)
        if kind == "eightbit":
            from torchao.optim import AdamW8bit

            return AdamW8bit(model.parameters(), lr=1e-3)
        if kind == "ddp":
            join_world_of_one(self.device)
        if kind == "fsdp2":
            self._shard(model)
        if kind == "graph":
            rate = torch.tensor(1e-3, device=self.device)
            return torch.optim.AdamW(model.parameters(), lr=rate, capturable=True, foreach=True)
        is_fused = kind in ("fused", "scaler", "fsdp2", "compiled", "ddp")
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=is_fused, foreach=not is_fused)

    def _shard(self, model: torch.nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        join_world_of_one(self.device)
        mesh = init_device_mesh(self.device, (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def wrap(self) -> None:
        """DDP goes around the finished model, so that the mapping can have the bare one."""
        if self.kind == "ddp":
            places = [0] if self.device == "cuda" else None
            self.call = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=places)

    # --- what the mapping is made of ----------------------------------------------------------------------------
    def state(self) -> dict[str, object]:
        found = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return found if self.scaler is None else found | {"scaler": self.scaler}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers and optimizer state, down to the plain tensors below DTensors and subclasses."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            _add(found, name, tensor.detach())
        for number, fields in enumerate(self.optimizer.state.values()):
            for key, value in fields.items():
                if isinstance(value, torch.Tensor):
                    _add(found, f"{number}.{key}", value)
        return found

    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    # --- a step -------------------------------------------------------------------------------------------------
    def compute(self, step: int) -> torch.Tensor:
        """Forward and backward on the batch of `step`; the loss stays on the device."""
        tokens = self._tokens(step)
        kind = torch.float16 if self.kind == "scaler" else torch.bfloat16
        with torch.autocast(self.device, kind, enabled=self.kind != "graph"):
            loss: torch.Tensor = self.call(tokens[:, :-1], tokens[:, 1:])
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, fence: Any = None) -> torch.Tensor:
        """One step of training. `fence`: called before a replay, which runs no hooks."""
        if self._graph is None:
            loss = self.compute(step)
            self.update()
            return loss
        self._inputs.copy_(self._tokens(step))
        if fence is not None:
            fence()
        self._graph.replay()
        self.scheduler.step()
        return self._loss.clone()

    def _tokens(self, step: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(step)
        size = (self.batch, self.shape.context + 1)
        return torch.randint(0, self.shape.vocabulary, size, generator=generator, device=self.device)

    def _capture(self) -> None:
        """Forward, backward and update as one CUDA graph, after three steps beside it as torch wants them."""
        self._inputs = self._tokens(0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.call(self._inputs[:, :-1], self._inputs[:, 1:]).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self.call(self._inputs[:, :-1], self._inputs[:, 1:])
            self._loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _add(found: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "_local_tensor"):
        _add(found, name, tensor._local_tensor)
    elif hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            _add(found, f"{name}.{part}", getattr(tensor, part))
    else:
        found[name] = tensor
