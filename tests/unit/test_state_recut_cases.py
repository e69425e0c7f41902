"""What people have beside model and optimizer when they change the number of ranks: DDP on two, then FSDP2 on three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from snapd_client.errors import RestoreMismatch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel

from tests.support.loopback import make_tree
from tests.unit.test_state_recut import Make, State, fill, save, world

Build = Callable[[str, bool], State]  # (how the model is cut, whether it was trained)


class Net(nn.Module):
    """Tied weights, a frozen one, buffers, and biases."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.norm = nn.Embedding(11, 6), nn.BatchNorm1d(6)
        self.inner, self.frozen = nn.Linear(6, 6), nn.Linear(6, 7)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.frozen.requires_grad_(False)


def model_of(kind: str, seed: int) -> nn.Module:
    model: nn.Module = Net(seed)
    if kind == "ddp":
        return DistributedDataParallel(model)
    shape, names = (
        ((2, 2), ("replicate", "shard")) if kind == "hsdp" else ((dist.get_world_size(),), ("shard",))
    )
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.5}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step, of gradients that do not depend on how the model is cut."""
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            count = parameter.numel()
            gradient = torch.linspace(-1, 1, count).reshape(parameter.shape) + number
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
            parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def local(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


def check_same(here: State, expected: State) -> None:
    models = here["model"], expected["model"]
    parameters, wanted = (dict(model.named_parameters()) for model in models)
    for name, parameter in wanted.items():
        assert torch.equal(local(parameters[name]), local(parameter)), name
        state, other = (
            one["optimizer"].state.get(at[name], {}) for one, at in ((here, parameters), (expected, wanted))
        )
        assert state.keys() == other.keys(), name
        for field, value in other.items():
            assert type(state[field]) is type(value), (name, field)
            assert torch.equal(local(state[field]), local(value)), (name, field)
    buffers, others = (dict(model.named_buffers()) for model in models)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in others.items())
    groups = (one["optimizer"].param_groups for one in (here, expected))
    for group, other_group in zip(*groups, strict=True):
        assert {**group, "params": 0} == {**other_group, "params": 0}
    for name in ("scheduler", "scaler"):
        if name in expected:
            assert here[name].state_dict() == expected[name].state_dict()
    if "ema" in expected:
        mean, other_mean = here["ema"].state_dict(), expected["ema"].state_dict()
        assert all(torch.equal(mean[name], tensor) for name, tensor in other_mean.items())


def check(build: Build, saved: tuple[str, int], wanted: tuple[str, int]) -> None:
    shards = save(lambda rank, size: build(saved[0], True), saved[1])
    for rank in range(wanted[1]):
        with world(rank, wanted[1]):
            here, expected = build(wanted[0], False), build(wanted[0], True)
            fill(make_tree(here, rank=rank, world_size=wanted[1]), shards)
            check_same(here, expected)
            train(here["model"], here["optimizer"])


def everything(kind: str, is_trained: bool) -> State:
    model = model_of(kind, 1 if is_trained else 2)
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, foreach=True)
    warm, rest = LinearLR(optimizer, total_iters=3), CosineAnnealingLR(optimizer, 5)
    scheduler = SequentialLR(optimizer, [warm, rest], [2])
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    ema = AveragedModel(Net(3 if is_trained else 4))
    if is_trained:
        for buffer in model.buffers():
            buffer.add_(2)
        ema.n_averaged.fill_(4)
        scaler.update(64.0)
        for _ in range(3):
            train(model, optimizer)
            scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema}


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (("ddp", 2), ("fsdp", 3)),
        (("fsdp", 3), ("ddp", 2)),
        (("fsdp", 3), ("hsdp", 4)),
        (("hsdp", 4), ("fsdp", 2)),
    ],
)
def test_groups_ties_buffers_scheduler_scaler_and_average(
    saved: tuple[str, int], wanted: tuple[str, int]
) -> None:
    check(everything, saved, wanted)


def swapped(order: list[int]) -> Make:
    def make(rank: int, size: int) -> State:
        model = model_of("fsdp", 1)
        groups = groups_of(model)
        return {"model": model, "optimizer": torch.optim.AdamW([groups[number] for number in order])}

    return make


def test_groups_in_another_order_are_refused_with_what_to_do() -> None:
    """Schedulers keep what they have by the groups' numbers: to sort the groups alone would give them other rates."""
    shards = save(swapped([0, 1]), 2)
    with world(0, 3), pytest.raises(RestoreMismatch) as refused:
        fill(make_tree(swapped([1, 0])(0, 3), rank=0, world_size=3), shards)
    assert refused.value.reshaped[0] == (
        "optimizer.param_groups.0.params (they are group 1 here: give the groups in the order in which they were"
        " saved; schedulers go by it)"
    )


def test_a_parameter_that_never_had_a_gradient_has_no_state_afterwards() -> None:
    def build(kind: str, is_trained: bool) -> State:
        model = model_of(kind, 1 if is_trained else 2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        if is_trained:
            unused = next(p for name, p in model.named_parameters() if name.endswith("inner.bias"))
            unused.requires_grad_(False)
            train(model, optimizer)
            unused.requires_grad_(True)
        return {"model": model, "optimizer": optimizer}

    check(build, ("ddp", 2), ("fsdp", 3))
