"""Optimizers by name: how each is made, for every test that resumes a run with it.

A row builds a whole world (model, optimizer, scheduler) from a seed and takes training steps; two worlds that
agree on `fingerprint` agree to the bit on every parameter, buffer, optimizer value and generator.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

VOCABULARY, WIDTH, BATCH, LENGTH = 64, 64, 4, 8


class Model(nn.Module):
    """Embedding, two linear layers, norm and dropout: what optimizers treat differently, and draws in the
    forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, VOCABULARY)
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        return self.down(self.dropout(self.norm(torch.tanh(self.up(hidden)))))


Params = list[nn.Parameter]
MakeOptimizer = Callable[[Model], "torch.optim.Optimizer | list[torch.optim.Optimizer]"]


@dataclass(frozen=True)
class Row:
    """One way to train. `needs_closure`: the optimizer calls the loss itself."""

    name: str
    make: MakeOptimizer
    needs_closure: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    imports: tuple[str, ...] = ()
    works_distributed: bool = False


def _torchao(name: str) -> MakeOptimizer:
    def make(model: Model) -> torch.optim.Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)(model.parameters(), lr=1e-2)

    return make


def _muon(model: Model) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]


def _two_groups(model: Model) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": torch.tensor(3e-3)}]
    return torch.optim.AdamW(groups, lr=1e-2, foreach=False)


def _adamw(**options: Any) -> MakeOptimizer:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


MATRIX: tuple[Row, ...] = (
    Row("adamw", _adamw(), works_distributed=True),
    Row("adamw-fused", _adamw(fused=True)),
    Row("adamw-foreach", _adamw(foreach=True)),
    Row("adamw-amsgrad", _adamw(amsgrad=True)),
    Row("adamw-groups-tensor-lr", _two_groups),
    Row(
        "sgd-momentum",
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        works_distributed=True,
    ),
    Row("sgd", lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    Row("adafactor", lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2)),
    Row(
        "lbfgs",
        lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3, history_size=4),
        needs_closure=True,
    ),
    Row("muon", _muon, works_distributed=True),
    Row("nadam", lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2)),
    Row("rmsprop", lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=0.9, centered=True)),
    Row("asgd", lambda m: torch.optim.ASGD(m.parameters(), lr=1e-2)),
    Row("rprop", lambda m: torch.optim.Rprop(m.parameters(), lr=1e-3), dtypes=(torch.float32,)),
    Row("torchao-8bit", _torchao("AdamW8bit"), imports=("torchao.optim",), works_distributed=True),
    Row("torchao-4bit", _torchao("AdamW4bit"), imports=("torchao.optim",)),
    Row("torchao-fp8", _torchao("AdamWFp8"), imports=("torchao.optim",)),
)


@dataclass
class World:
    """A training run in the making: everything that a snapshot has to bring back."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]
    row: Row
    losses: list[float] = field(default_factory=list)
    step_number: int = 0

    def state(self) -> dict[str, object]:
        state: dict[str, object] = {"model": self.model, "schedulers": list(self.schedulers)}
        state["optimizer"] = self.optimizers[0] if len(self.optimizers) == 1 else list(self.optimizers)
        return state

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
        targets = (tokens * 3 + random.randint(0, 2) + int(np.random.randint(0, 2))) % VOCABULARY

        def closure() -> torch.Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            logits = self.model(tokens).float()
            loss = nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))
            loss.backward()
            return loss

        if self.row.needs_closure:
            loss = self.optimizers[0].step(closure)
        else:
            loss = closure()
            for optimizer in self.optimizers:
                optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        self.losses.append(float(loss.detach()))
        self.step_number += 1


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_world(
    row: Row, seed: int, dtype: torch.dtype = torch.float32, wrap: Callable[[Model], nn.Module] | None = None
) -> World:
    """`wrap` distributes the model before the optimizer is made."""
    seed_everything(seed)
    model = Model().to(dtype)
    wrapped: Any = model if wrap is None else wrap(model)
    made = row.make(wrapped)
    optimizers = made if isinstance(made, list) else [made]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9) for optimizer in optimizers]
    return World(wrapped, optimizers, schedulers, row)


def fingerprint(world: World) -> dict[str, object]:
    """Every value that decides how the run goes on, as plain comparable values."""
    found: dict[str, object] = {}
    for name, tensor in (*world.model.named_parameters(), *world.model.named_buffers()):
        found[f"model.{name}"] = bits(tensor)
    names = {id(p): name for name, p in world.model.named_parameters()}
    for number, optimizer in enumerate(world.optimizers):
        for key, fields in optimizer.state.items():
            for path, value in flatten(fields, names.get(id(key), str(key))):
                found[f"optimizer.{number}.{path}"] = value
        for index, group in enumerate(optimizer.param_groups):
            for path, value in flatten({k: v for k, v in group.items() if k != "params"}, f"group.{index}"):
                found[f"optimizer.{number}.{path}"] = value
    for number, scheduler in enumerate(world.schedulers):
        for path, value in flatten(scheduler.state_dict(), f"scheduler.{number}"):
            found[path] = value
    found["rng.python"] = random.getstate()
    found["rng.numpy"] = str(np.random.get_state())
    found["rng.torch"] = bits(torch.get_rng_state())
    found["losses"] = [struct.pack("<d", loss) for loss in world.losses]
    return found


def flatten(value: Any, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, torch.Tensor):
        yield path, (type(value).__name__, bits(value))
    elif isinstance(value, dict):
        yield f"{path}.keys", [str(key) for key in value]
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        yield f"{path}.type", type(value).__name__
        for index, item in enumerate(value):
            yield from flatten(item, f"{path}.{index}")
    elif isinstance(value, float):
        yield path, struct.pack("<d", value)
    elif isinstance(value, torch.optim.Optimizer):
        yield from flatten(list(value.state.values()), f"{path}.state")
        yield from flatten(
            [[*group["params"], group["lr"]] for group in value.param_groups], f"{path}.groups"
        )
    elif hasattr(value, "__dict__") and type(value).__module__ not in ("builtins", "collections"):
        yield from flatten(vars(value), path)
    else:
        yield path, type(value).__name__ if callable(value) else repr(value)


def bits(tensor: torch.Tensor) -> object:
    """dtype, shape and bytes; of wrappers those of their components."""
    from snapd_client.state.tensors import component, component_names

    names = component_names(tensor)
    if names:
        return tuple((name, bits(component(tensor, name))) for name in names)
    dense = tensor.detach().contiguous().reshape(-1)
    raw = dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), raw


def first_difference(one: dict[str, object], other: dict[str, object]) -> str:
    """The name of the first value that differs; empty if none does."""
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other or one[name] != other[name]:
            return name
    return ""
