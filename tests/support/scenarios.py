"""Ways to train that a snapshot must survive, beyond the optimizer matrix: each builds a run from a seed.

A scenario's run is the sum of its steps; two runs that agree on `fingerprint()` agree on every bit that
matters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tests.support.optimizer_matrix import (
    MATRIX,
    Row,
    World,
    bits,
    fingerprint,
    flatten,
    make_world,
    seed_everything,
)


class Run(Protocol):
    """One training run in the making."""

    def state(self) -> dict[str, object]: ...
    def step(self, number: int) -> None: ...
    def fingerprint(self) -> dict[str, object]: ...


Scenario = Callable[[int], Run]  # seed -> run


class MatrixRun:
    """A row of the optimizer matrix."""

    def __init__(self, row: Row, seed: int, dtype: torch.dtype, wrap: Any = None) -> None:
        self.world: World = make_world(row, seed, dtype, wrap)

    def state(self) -> dict[str, object]:
        return self.world.state()

    def step(self, number: int) -> None:
        self.world.losses.clear()
        self.world.train(1)

    def fingerprint(self) -> dict[str, object]:
        return fingerprint(self.world)


class SmallRun:
    """A two-layer model with dropout; subclasses say how it trains."""

    def __init__(self, seed: int) -> None:
        seed_everything(seed)
        self.model = nn.Sequential(
            nn.Linear(16, 64), nn.Tanh(), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 4)
        )
        self.extra: dict[str, object] = {}
        self.loss = torch.zeros(())
        self.build()

    def build(self) -> None:
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def optimizers(self) -> Any:
        return self.optimizer

    def state(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizers(), **self.extra}

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        shift = random.random() + float(np.random.rand())
        return torch.randn(8, 16) + shift, torch.randn(8, 4)

    def forward_loss(self) -> torch.Tensor:
        inputs, targets = self.batch()
        self.loss = (self.model(inputs) - targets).square().mean()
        return self.loss

    def step(self, number: int) -> None:
        self.forward_loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fingerprint(self) -> dict[str, object]:
        found: dict[str, object] = {"loss": bits(self.loss)}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            found[f"model.{name}"] = bits(tensor)
        optimizers = self.optimizers()
        listed = optimizers if isinstance(optimizers, list) else [optimizers]
        for index, optimizer in enumerate(listed):
            for path, value in flatten(optimizer.state_dict(), f"optimizer.{index}"):
                found[path] = value
        for name, item in self.extra.items():
            if hasattr(item, "state_dict"):
                found.update(flatten(item.state_dict(), name))
        found["rng"] = (random.getstate(), str(np.random.get_state()), bits(torch.get_rng_state()))
        return found


class TwoInTurn(SmallRun):
    """Two optimizers of one model, each at every other step (as a GAN does)."""

    def build(self) -> None:
        parameters = list(self.model.parameters())
        self.pair = [
            torch.optim.AdamW(parameters[:2], lr=1e-2),
            torch.optim.SGD(parameters[2:], lr=1e-2, momentum=0.9),
        ]

    def optimizers(self) -> Any:
        return self.pair

    def step(self, number: int) -> None:
        self.forward_loss().backward()
        self.pair[number % 2].step()
        self.model.zero_grad()


class Scaled(SmallRun):
    """GradScaler; every third loss overflows, so that the update is skipped and the scale changes."""

    def build(self) -> None:
        super().build()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        self.extra["scaler"] = self.scaler

    def step(self, number: int) -> None:
        loss = self.forward_loss()
        if number % 3 == 1:
            loss = loss * float("inf")
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


class InBackward(SmallRun):
    """One optimizer per parameter, stepped by a hook inside the backward pass."""

    def build(self) -> None:
        self.by_parameter = {p: torch.optim.AdamW([p], lr=1e-2) for p in self.model.parameters()}
        for parameter in self.by_parameter:
            parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: torch.Tensor) -> None:
        optimizer = self.by_parameter[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    def optimizers(self) -> Any:
        return list(self.by_parameter.values())

    def step(self, number: int) -> None:
        self.forward_loss().backward()


class Accumulating(SmallRun):
    """Gradients of three micro-batches; the snapshot comes after each of them, gradients included."""

    def step(self, number: int) -> None:
        self.forward_loss().backward()
        if number % 3 == 2:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def fingerprint(self) -> dict[str, object]:
        grads = {
            f"grad.{n}": None if p.grad is None else bits(p.grad) for n, p in self.model.named_parameters()
        }
        return {**super().fingerprint(), **grads}


class Evaluating(SmallRun):
    """An evaluation pass, which draws random numbers, between the update and the snapshot."""

    def step(self, number: int) -> None:
        super().step(number)
        self.model.eval()
        with torch.no_grad():
            self.model(self.batch()[0])
        self.model.train()


class CompiledStep(SmallRun):
    """The optimizer's step is compiled; its fence must still be called."""

    def build(self) -> None:
        super().build()
        self.compiled = torch.compile(self.optimizer.step)

    def step(self, number: int) -> None:
        self.forward_loss().backward()
        self.compiled()
        self.optimizer.zero_grad()


class WithExtras(SmallRun):
    """Schedulers, an EMA copy, a generator of its own, tied weights, plain values and a stateful object."""

    def build(self) -> None:
        super().build()
        self.model.append(nn.Linear(4, 4))
        self.model.append(nn.Linear(4, 4))
        self.model[-1].weight = self.model[-2].weight
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.generator = torch.Generator().manual_seed(7)
        self.counters = {"seen": 0, "names": ["a"], "best": float("inf")}
        self.extra = {
            "scheduler": self.schedule,
            "ema": self.average,
            "generator": self.generator,
            "counters": self.counters,
        }

    def step(self, number: int) -> None:
        super().step(number)
        self.schedule.step()
        self.average.update_parameters(self.model)
        self.counters["seen"] = int(str(self.counters["seen"])) + 1
        self.counters["best"] = min(float(str(self.counters["best"])), self.loss.item())
        with torch.no_grad():
            self.model[0].bias.add_(torch.randn(64, generator=self.generator) * 1e-3)

    def fingerprint(self) -> dict[str, object]:
        return {
            **super().fingerprint(),
            "counters": repr(self.counters),
            "generator": bits(self.generator.get_state()),
        }


class FrozenBase(SmallRun):
    """A frozen base with small adapters: the base's chunks cannot change."""

    def build(self) -> None:
        self.base = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)]).requires_grad_(False)
        self.model = nn.Sequential(nn.Linear(16, 512), self.base, nn.Dropout(0.1), nn.Linear(512, 4))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)


class Loading(SmallRun):
    """A shuffling stateful loader; `workers` processes; an epoch has five batches."""

    workers = 0

    def build(self) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        super().build()
        inputs = torch.arange(20 * 16, dtype=torch.float32).reshape(20, 16) / 320
        self.loader = StatefulDataLoader(
            torch.utils.data.TensorDataset(inputs, inputs[:, :4].clone()),
            batch_size=4,
            shuffle=True,
            num_workers=self.workers,
        )
        self.extra["loader"] = self.loader
        self.batches: Iterator[Any] | None = None

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        while True:
            if self.batches is None:
                self.batches = iter(self.loader)
            found = next(self.batches, None)
            if found is not None:
                return found[0], found[1]
            self.batches = None

    def fingerprint(self) -> dict[str, object]:
        found = super().fingerprint()
        return {name: value for name, value in found.items() if not name.startswith("loader")}

    def end(self) -> None:
        self.batches = self.loader._iterator = None


class LoadingWithWorkers(Loading):
    workers = 2


def _matrix(row: Row, dtype: torch.dtype) -> Scenario:
    return lambda seed: MatrixRun(row, seed, dtype)


SCENARIOS: dict[str, Scenario] = {
    f"{row.name}-{str(dtype).removeprefix('torch.')}": _matrix(row, dtype)
    for row in MATRIX
    for dtype in row.dtypes
} | {
    "two-in-turn": TwoInTurn,
    "scaler-skips": Scaled,
    "in-backward": InBackward,
    "accumulating": Accumulating,
    "evaluating": Evaluating,
    "compiled-step": CompiledStep,
    "extras": WithExtras,
    "frozen-base": FrozenBase,
    "loader-mid-epoch": Loading,
    "loader-workers-mid-epoch": LoadingWithWorkers,
    "loader-epoch-end": Loading,
    "loader-workers-epoch-end": LoadingWithWorkers,
}

STEPS_BEFORE = {"loader-epoch-end": 5, "loader-workers-epoch-end": 5}
STEPS_BEFORE_DEFAULT, STEPS_AFTER = 4, 4
OPTIONS: dict[str, dict[str, Any]] = {"accumulating": {"gradients": True}}
