"""Optimizers that keep state in odd places, and the objects around them: resuming equals not having stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.support.exotic_optimizers import EXOTIC, Magma
from tests.support.loopback import Loopback, make_tree, restore
from tests.support.optimizer_matrix import Row, World, bits, fingerprint, first_difference, make_world

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
}


def resumes(
    make: Callable[[int], World], extra: Callable[[World], dict[str, Any]] = lambda world: {}
) -> World:
    """Train, capture, train on; do the same from a fresh world; the two agree to the bit."""
    torch.set_num_threads(1)
    world = make(1)
    world.train(4)
    loopback = Loopback(make_tree({**world.state(), **extra(world)}))
    snapshot = loopback.capture()
    world.losses.clear()
    world.train(4)
    expected = fingerprint(world)
    resumed = make(2)
    restore(make_tree({**resumed.state(), **extra(resumed)}), snapshot)
    resumed.train(4)
    assert first_difference(expected, fingerprint(resumed)) == ""
    restore(loopback.tree, snapshot)
    world.losses.clear()
    world.train(4)
    assert first_difference(expected, fingerprint(world)) == ""
    return resumed


@pytest.mark.parametrize("name", EXOTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_in_odd_places(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name in ("projector object", "optimizer in the state"):
        pytest.skip("svd and friends need float32")
    resumes(lambda seed: make_world(Row(name, EXOTIC[name]), seed, dtype))  # type: ignore[arg-type]


def test_shared_tables_stay_one_object() -> None:
    world = resumes(lambda seed: make_world(Row("shared", EXOTIC["shared tables"]), seed))  # type: ignore[arg-type]
    optimizer: Any = world.optimizers[0]
    assert all(fields["qmap"] is optimizer.qmap for fields in optimizer.state.values())


def test_a_wrapper_and_its_base_stay_joined() -> None:
    world = resumes(lambda seed: make_world(Row("magma", EXOTIC["table by id"]), seed))  # type: ignore[arg-type]
    optimizer = world.optimizers[0]
    assert isinstance(optimizer, Magma) and optimizer.param_groups is optimizer.base.param_groups
    assert set(optimizer._magma) == {id(p) for p in world.model.parameters()}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    def make(seed: int) -> World:
        world = make_world(Row("sgd", lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), seed)
        world.schedulers = [SCHEDULERS[name](world.optimizers[0])]
        return world

    resumes(make)


class PlateauWorld(World):
    def _step(self) -> None:
        schedulers, self.schedulers = self.schedulers, []
        super()._step()
        self.schedulers = schedulers
        schedulers[0].step(self.losses[-1])


def test_reduce_on_plateau() -> None:
    def make(seed: int) -> World:
        row = Row("sgd", lambda m: torch.optim.SGD(m.parameters(), lr=0.5))
        world = make_world(row, seed)
        plateau = lr_scheduler.ReduceLROnPlateau(world.optimizers[0], patience=0, threshold=0.5)
        return PlateauWorld(world.model, world.optimizers, [plateau], row)

    assert resumes(make).optimizers[0].param_groups[0]["lr"] < 0.5, (
        "the plateau was never met: the test is void"
    )


class ScaledWorld(World):
    """A GradScaler whose steps are skipped now and then, and an average of the model."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        self.skipped = 0

    def _step(self) -> None:
        tokens = torch.randint(0, 64, (4, 8))
        self.optimizers[0].zero_grad()
        loss = self.model(tokens).square().mean() * (1e3 if random.random() < 0.3 else 1.0)
        self.scaler.scale(loss).backward()
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizers[0])
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < before
        self.average.update_parameters(self.model)
        self.losses.append(float(loss.detach()))


def test_scaler_that_skips_and_an_averaged_model() -> None:
    worlds: list[ScaledWorld] = []

    def make(seed: int) -> World:
        row = Row("adamw", lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))
        world = make_world(row, seed)
        worlds.append(ScaledWorld(world.model, world.optimizers, [], row))
        return worlds[-1]

    resumes(make, lambda world: {"scaler": world.scaler, "average": world.average})  # type: ignore[attr-defined]
    assert worlds[0].skipped, "no step was skipped: the test is void"
    one, other = (world.average.state_dict() for world in worlds)
    assert all(bits(one[name]) == bits(other[name]) for name in one) and len(one) > 1


class Remembering(nn.Module):
    """A module with extra state, as quantisation recipes have it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.recipe: dict[str, Any] = {"amax": [0.0], "kind": "fresh"}

    def get_extra_state(self) -> Any:
        return self.recipe

    def set_extra_state(self, state: Any) -> None:
        self.recipe = state


def test_extra_state_of_modules() -> None:
    model = nn.Sequential(Remembering())
    loopback = Loopback(make_tree({"model": model}))
    loopback.capture()
    model[0].recipe = {"amax": [1.5, 2.5], "kind": "used"}
    snapshot = loopback.capture()
    assert loopback.layouts_built == 1
    live = nn.Sequential(Remembering())
    restore(make_tree({"model": live}), snapshot)
    assert live[0].recipe == model[0].recipe and torch.equal(live[0].linear.weight, model[0].linear.weight)


class Average:
    """An object that tells its own state, with large tensors in it."""

    def __init__(self, model: nn.Module, fill: float, copies: bool) -> None:
        self.shadow = {name: torch.full_like(p, fill) for name, p in model.named_parameters()}
        self.count, self.copies = 0, copies

    def state_dict(self) -> dict[str, Any]:
        shadow = {name: value.clone() for name, value in self.shadow.items()} if self.copies else self.shadow
        return {"shadow": shadow, "count": self.count, "again": [shadow]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["again"][0] is state["shadow"]
        self.shadow, self.count = state["shadow"], state["count"]


@pytest.mark.parametrize("copies", [False, True])
def test_objects_that_tell_their_own_state(copies: bool) -> None:
    model = nn.Linear(100, 100)
    average = Average(model, 3.0, copies)
    loopback = Loopback(make_tree({"model": model, "average": average}))
    loopback.capture()
    average.count = 9
    average.shadow["weight"] += 1
    snapshot = loopback.capture()
    assert loopback.layouts_built == 1
    names = [tensor.name for tensor in snapshot.layout.tensors]
    assert "average.shadow.weight" in names and "average.shadow.bias" not in names, (
        "large ones only lie apart"
    )
    live = Average(model, 0.0, copies)
    restore(make_tree({"model": model, "average": live}), snapshot)
    assert live.count == 9 and live.shadow["weight"].unique().tolist() == [4.0]
    assert live.shadow["bias"].unique().tolist() == [3.0]


class Offload(torch.optim.Optimizer):
    """torchao's CPUOffloadOptimizer: never runs the base's __init__, tells its own state."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = [torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()]

    @property
    def param_groups(self) -> Any:
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.inner:
            optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.inner:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"offloaded": [optimizer.state_dict() for optimizer in self.inner]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, part in zip(self.inner, state["offloaded"], strict=True):
            optimizer.load_state_dict(part)


def test_a_wrapper_that_tells_its_own_state() -> None:
    def make(seed: int) -> World:
        torch.manual_seed(seed)
        model = nn.Linear(128, 64)
        return World(model, [Offload(model)], [], Row("offload", Offload))

    def train(world: World) -> Any:
        for _ in range(3):
            world.optimizers[0].zero_grad()
            world.model(torch.randn(4, 128)).square().sum().backward()
            world.optimizers[0].step()
        return [bits(p) for p in world.model.parameters()]

    world = make(1)
    train(world)
    tree = make_tree(world.state())
    assert tree.optimizers == [], "it cannot be hooked"
    snapshot = Loopback(tree).capture()
    expected = train(world)
    resumed = make(2)
    restore(make_tree(resumed.state()), snapshot)
    assert train(resumed) == expected


def test_a_quantised_frozen_base_with_an_adapter() -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        base, adapter = nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
        base.requires_grad_(False)
        return {"base": base, "adapter": adapter, "optimizer": torch.optim.AdamW(adapter.parameters())}

    state = make(1)
    snapshot = Loopback(make_tree(state)).capture()
    layout = snapshot.layout
    weight = next(tensor for tensor in layout.tensors if tensor.name == "base.0.weight")
    parts = [layout.tensors[part.tensor] for part in weight.subclass.components]
    assert parts and {layout.regions[part.region].range_name for part in parts} == {"frozen"}
    live = make(2)
    restore(make_tree(live), snapshot)
    assert bits(live["base"][0].weight) == bits(state["base"][0].weight)
    inputs = torch.randn(2, 64)
    assert torch.equal(live["base"](inputs), state["base"](inputs))


def test_an_optimizer_per_parameter() -> None:
    def many(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()]

    resumes(lambda seed: make_world(Row("per parameter", many), seed))  # type: ignore[arg-type]


def test_gradients_under_accumulation() -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(8, 8)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def accumulate(model: nn.Module) -> None:
        model(torch.randn(2, 8)).square().sum().backward()

    model, optimizer = make(1)
    accumulate(model)
    loopback = Loopback(make_tree({"model": model, "optimizer": optimizer}, gradients=True))
    snapshot = loopback.capture()
    accumulate(model)
    optimizer.step()
    live, fresh = make(2)
    restore(make_tree({"model": live, "optimizer": fresh}, gradients=True), snapshot)
    accumulate(live)
    fresh.step()
    assert bits(live.weight) == bits(model.weight)
    optimizer.zero_grad()
    loopback.capture()
    accumulate(model)
    again = loopback.capture()
    restore(make_tree({"model": live, "optimizer": fresh}, gradients=True), again)
    assert bits(live.weight.grad) == bits(model.weight.grad)
    optimizer.zero_grad()
    none = loopback.capture()
    restore(make_tree({"model": live, "optimizer": fresh}, gradients=True), none)
