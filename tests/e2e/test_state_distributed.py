"""FSDP2 and DDP over gloo, two ranks: the cases run one after the other in one pair of processes."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from snapd_client.errors import IntegrityError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.loopback import Loopback, Snapshot, make_tree, restore
from tests.support.optimizer_matrix import (
    MATRIX,
    VOCABULARY,
    Model,
    World,
    fingerprint,
    first_difference,
    make_world,
)

WORLD_SIZE = 2
ROWS = {row.name: row for row in MATRIX}
DISTRIBUTED = [row.name for row in MATRIX if row.works_distributed]


def _sharded(mesh: DeviceMesh, *, reshard: bool = True) -> Callable[[Model], nn.Module]:
    def wrap(model: Model) -> nn.Module:
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        return model

    return wrap


def _evaluate(world: World) -> None:
    """Leaves FSDP2's root unsharded when it is told not to reshard after the forward."""
    world.model.eval()
    with torch.no_grad():
        world.model(torch.randint(0, VOCABULARY, (2, 4)))
    world.model.train()


def _resumes(name: str, wrap: Callable[[Model], nn.Module], *, evaluate: bool = False) -> None:
    world = make_world(ROWS[name], seed=1, wrap=wrap)
    tree = make_tree(world.state(), rank=dist.get_rank(), world_size=WORLD_SIZE)
    loopback = Loopback(tree)
    world.train(3)
    if evaluate:
        _evaluate(world)
    snapshot = loopback.capture(3)
    world.losses.clear()
    world.train(3)
    expected = fingerprint(world)

    resumed = make_world(ROWS[name], seed=2, wrap=wrap)
    if evaluate:
        _evaluate(resumed)
    restore(make_tree(resumed.state(), rank=dist.get_rank(), world_size=WORLD_SIZE), snapshot)
    if evaluate:
        _evaluate_neutrally(resumed)
    resumed.train(3)
    difference = first_difference(expected, fingerprint(resumed))
    assert difference == "", difference
    restore(tree, snapshot)  # in place
    world.losses.clear()
    world.train(3)
    difference = first_difference(expected, fingerprint(world))
    assert difference == "", difference


def _evaluate_neutrally(world: World) -> None:
    from snapd_client.state.rng import rng_neutral

    with rng_neutral():
        _evaluate(world)


def case_fsdp2(mesh: DeviceMesh) -> None:
    for name in DISTRIBUTED:
        _resumes(name, _sharded(mesh))


def case_fsdp2_state_is_sharded(mesh: DeviceMesh) -> None:
    world = make_world(ROWS["torchao-8bit"], seed=1, wrap=_sharded(mesh))
    world.train(1)
    snapshot = Loopback(make_tree(world.state(), rank=dist.get_rank(), world_size=WORLD_SIZE)).capture()
    tensors = {tensor.name: tensor for tensor in snapshot.layout.tensors}
    weight = tensors["model.up.weight"]
    assert list(weight.global_shape) == [128, 64] and list(weight.distributed.placements) == ["S(0)"]
    assert list(weight.local_offset) == [64 * dist.get_rank(), 0]
    moment = tensors["optimizer.state.model.up.weight.exp_avg"]
    assert moment.subclass.type_name.endswith(":DTensor")
    inner = snapshot.layout.tensors[moment.subclass.components[0].tensor]
    assert inner.subclass.type_name.endswith("OptimState8bit"), (
        "the sharded moment is not quantised: the test is void"
    )


def case_fsdp2_unsharded_after_evaluation(mesh: DeviceMesh) -> None:
    world = make_world(ROWS["adamw"], seed=1, wrap=_sharded(mesh, reshard=False))
    world.train(1)
    _evaluate(world)
    shown = dict(world.model.named_parameters())["embedding.weight"]
    assert not isinstance(shown, DTensor), "the root is sharded after all: the test is void"
    tree = make_tree(world.state(), rank=dist.get_rank(), world_size=WORLD_SIZE)
    tensors = {tensor.name: tensor for tensor in Loopback(tree).capture().layout.tensors}
    assert list(tensors["model.embedding.weight"].distributed.placements) == ["S(0)"]
    _resumes("adamw", _sharded(mesh, reshard=False), evaluate=True)


def case_fsdp2_layout_survives_evaluation(mesh: DeviceMesh) -> None:
    world = make_world(ROWS["adamw"], seed=1, wrap=_sharded(mesh, reshard=False))
    loopback = Loopback(make_tree(world.state(), rank=dist.get_rank(), world_size=WORLD_SIZE))
    world.train(1)
    loopback.capture()
    world.train(1)
    loopback.capture()
    _evaluate(world)
    loopback.capture()
    assert loopback.layouts_built == 1


def case_ddp(mesh: DeviceMesh) -> None:
    for name in DISTRIBUTED:
        _resumes(name, DistributedDataParallel)


def case_ddp_replica_set(mesh: DeviceMesh) -> None:
    world = make_world(ROWS["adamw"], seed=1, wrap=DistributedDataParallel)
    world.train(1)
    tree = make_tree(world.state(), rank=dist.get_rank(), world_size=WORLD_SIZE)
    for tensor in Loopback(tree).capture().layout.tensors:
        wanted = [0, 1] if tensor.role in ("parameter", "optimizer") else []
        assert list(tensor.replica_set.ranks) == wanted, tensor.name
        assert not tensor.name.startswith("model.") or tensor.name.startswith("model.module.")


def _exchange(snapshot: Snapshot) -> dict[int, Snapshot]:
    """Every rank's shard on every rank, as they lie in one node's arena."""
    found: list[Snapshot | None] = [None] * WORLD_SIZE
    dist.all_gather_object(found, snapshot)
    return {rank: shard for rank, shard in enumerate(found) if shard is not None and rank != dist.get_rank()}


def _replicated_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD_SIZE, 1), mesh_dim_names=("replicate", "shard"))


def _hybrid(model: Model) -> nn.Module:
    return _sharded(_replicated_mesh())(model)


def case_replicas_share_out_their_bytes(mesh: DeviceMesh) -> None:
    for name in DISTRIBUTED:
        for wrap in (DistributedDataParallel, _hybrid):
            _replicas_share_out(name, wrap)


def _replicas_share_out(name: str, wrap: Callable[[Model], nn.Module]) -> None:
    options = {"rank": dist.get_rank(), "world_size": WORLD_SIZE}
    world = make_world(ROWS[name], seed=1, wrap=wrap)
    world.train(3)
    tree = make_tree(world.state(), **options)
    whole = Loopback(tree)
    whole.capture()
    shared = Loopback(tree, node_ranks=range(WORLD_SIZE))
    snapshot = shared.capture(3)
    assert whole.layout is not None and shared.layout is not None
    assert shared.layout.state_nbytes < 0.65 * whole.layout.state_nbytes, "hardly anything was shared out"
    others = _exchange(snapshot)
    world.losses.clear()
    world.train(2)
    expected = fingerprint(world)
    resumed = make_world(ROWS[name], seed=2, wrap=wrap)
    restore(make_tree(resumed.state(), **options), snapshot, others=others)
    resumed.train(2)
    difference = first_difference(expected, fingerprint(resumed))
    assert difference == "", (name, difference)
    try:
        restore(tree, snapshot)
    except IntegrityError as error:
        assert "lie in another one" in str(error)
    else:
        raise AssertionError("half a shard was taken for a whole one")


def case_gradients(mesh: DeviceMesh) -> None:
    world = make_world(ROWS["adamw"], seed=1, wrap=_sharded(mesh))
    tree = make_tree(world.state(), gradients=True, rank=dist.get_rank(), world_size=WORLD_SIZE)
    world.train(2)
    snapshot = Loopback(tree).capture()
    before = [p.grad.to_local().clone() for p in world.model.parameters() if p.grad is not None]
    assert before
    resumed = make_world(ROWS["adamw"], seed=2, wrap=_sharded(mesh))
    restore(make_tree(resumed.state(), gradients=True, rank=dist.get_rank(), world_size=WORLD_SIZE), snapshot)
    after = [p.grad.to_local() for p in resumed.model.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


CASES: dict[str, Callable[[DeviceMesh], None]] = {
    name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")
}


def _run_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for name, case in CASES.items():
        torch._dynamo.reset()
        verdict = "ok"
        try:
            case(mesh)
        except Exception:
            verdict = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(verdict)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run_rank, (port, str(folder)), nprocs=WORLD_SIZE)
    return Path(folder)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks(verdicts: Path, name: str) -> None:
    for rank in range(WORLD_SIZE):
        verdict = verdicts / f"{name}.{rank}"
        assert verdict.exists(), "the rank did not get to this case"
        assert verdict.read_text() == "ok"
