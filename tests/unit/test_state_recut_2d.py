"""FSDP2 over tensor parallelism, sizes that nothing divides, and which layouts of hundreds of ranks a restore reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from snapd_client.errors import RestoreMismatch
from snapd_client.state.apply import prepare_restore
from snapd_client.state.layouts import Layouts
from snapd_client.state.resharding import Elastic
from snapd_proto import format_pb2 as pb
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from tests.support.loopback import make_tree
from tests.unit.test_state_recut import Holder, Make, State, cut, load, local, save, whole, world

COLUMNS = 3


def two_ways(rows: int, model: int, value: float) -> Make:
    """A linear layer of `rows` outputs, cut by `model` ranks of tensor parallelism and by the rest of FSDP2."""

    def make(rank: int, size: int) -> State:
        linear = nn.Linear(COLUMNS, rows)
        with torch.no_grad():
            linear.weight.copy_(whole(rows, COLUMNS) * value)
            linear.bias.copy_(torch.arange(rows) * value)
        mesh = init_device_mesh("cpu", (size // model, model), mesh_dim_names=("data", "model"))
        parallelize_module(linear, mesh["model"], ColwiseParallel(), src_data_rank=None)
        fully_shard(linear, mesh=mesh["data"])
        return {"model": linear}

    return make


def plain(rows: int) -> Make:
    return lambda rank, size: {"model": nn.Linear(COLUMNS, rows)}


def parts(loaded: list[State], name: str) -> list[torch.Tensor]:
    return [local(getattr(state["model"], name)).clone() for state in loaded]


def as_built(make: Make, size: int, name: str) -> list[torch.Tensor]:
    """What each rank has of a freshly built model."""
    found = []
    for rank in range(size):
        with world(rank, size):
            found.append(local(getattr(make(rank, size)["model"], name)).clone())
    return found


@pytest.mark.parametrize("rows", [1, 3, 5, 7, 8, 9, 13])
@pytest.mark.parametrize(("data", "model"), [(2, 2), (3, 2), (4, 2), (2, 3)])
def test_uneven_parts_of_two_ways_at_once(rows: int, data: int, model: int) -> None:
    """Nine rows on 4 x 2 ranks are a case of which torch's own full_tensor gets the parts wrong."""
    shards = save(two_ways(rows, model, 1.0), data * model)
    one = load(plain(rows), 1, shards)[0]["model"]
    assert torch.equal(one.weight, whole(rows, COLUMNS)) and torch.equal(one.bias, torch.arange(float(rows)))
    for other in (2, 3):
        expected = two_ways(rows, other, 1.0)
        loaded = load(two_ways(rows, other, 0.0), 2 * other, shards)
        for name in ("weight", "bias"):
            pairs = zip(parts(loaded, name), as_built(expected, 2 * other, name), strict=True)
            assert all(torch.equal(got, wanted) for got, wanted in pairs), name


def test_the_cut_is_what_the_test_says() -> None:
    with world(0, 8):
        weight: Any = two_ways(9, 2, 1.0)(0, 8)["model"].weight
        assert [str(one) for one in weight.placements] == ["_S(0, 2)", "S(0)"]


def test_an_uneven_cut_that_is_the_same_is_restored_whatever_it_is() -> None:
    shards = save(two_ways(9, 2, 1.0), 8)
    loaded = load(two_ways(9, 2, 0.0), 8, shards)
    assert all(map(torch.equal, parts(loaded, "weight"), as_built(two_ways(9, 2, 1.0), 8, "weight")))


def test_parts_that_are_no_boxes_are_refused_by_name() -> None:
    """Strided, but over nothing: each rank has every other run of rows."""

    def strided(rank: int, size: int) -> State:
        mesh = init_device_mesh("cpu", (size,))
        placements = [_StridedShard(0, split_factor=2)]
        return {"model": Holder(weight=distribute_tensor(whole(8), mesh, placements, src_data_rank=None))}

    shards = save(strided, 2)
    with pytest.raises(
        RestoreMismatch, match=r"model\.weight \(8x3 as \[_S\(0, 2\)\] on a mesh of 2, a rank having 4x3"
    ):
        load(lambda rank, size: {"model": Holder(weight=torch.zeros(8, 3))}, 1, shards)
    with pytest.raises(RestoreMismatch, match=r"model\.weight \(8x3 as \[_S\(0, 2\)\] on a mesh of 3"):
        load(strided, 3, shards)


def test_an_uneven_cut_that_fsdp_did_not_make_is_refused_by_name() -> None:
    """By hand, from left to right: some ranks have other parts than FSDP2 would leave them."""

    def by_hand(rank: int, size: int) -> State:
        mesh = init_device_mesh("cpu", (3, 4))
        placements = [_StridedShard(0, split_factor=4), Shard(0)]
        return {"model": Holder(weight=distribute_tensor(whole(27), mesh, placements, src_data_rank=None))}

    shards = save(by_hand, 12)
    with pytest.raises(
        RestoreMismatch, match=r"model\.weight \(27x3 as \[_S\(0, 4\), S\(0\)\] on a mesh of 3x4"
    ):
        load(lambda rank, size: {"model": Holder(weight=torch.zeros(27, 3))}, 1, shards)


class Counted(Layouts):
    def __init__(self, layouts: dict[int, pb.ShardLayout]) -> None:
        self.calls: list[list[int]] = []

        def read(ranks: Collection[int]) -> dict[int, pb.ShardLayout]:
            self.calls.append(sorted(ranks))
            return {rank: layouts[rank] for rank in ranks}

        super().__init__(len(layouts), read)


def layouts_read(make: Make, rank: int, size: int, shards: Any) -> list[list[int]]:
    with world(rank, size):
        layouts = Counted({at: shard.layout for at, shard in shards.items()})
        base = rank % len(shards)
        prepare_restore(
            make_tree(make(rank, size), rank=rank, world_size=size),
            layouts[base],
            shards[base].early,
            elastic=Elastic(layouts),
        )
        return layouts.calls


def model_of(value: float) -> Make:
    return lambda rank, size: {"model": Holder(weight=cut(whole(64) * value), small=cut(whole(5) * value))}


def test_only_the_layouts_of_ranks_that_are_met_are_read() -> None:
    shards = save(model_of(1.0), 32)
    assert layouts_read(model_of(0.0), 0, 16, shards) == [[0], [1]]
    assert layouts_read(model_of(0.0), 9, 16, shards) == [[9], [18, 19]]
    assert layouts_read(model_of(0.0), 40, 64, shards) == [[8], [20]]
    only: Make = lambda rank, size: {"model": Holder(weight=torch.zeros(64, 3), small=torch.zeros(5, 3))}  # noqa: E731
    assert layouts_read(only, 0, 1, shards) == [[0], list(range(1, 32))]


def test_replicas_are_read_from_one_of_them() -> None:
    def replicated(value: float) -> Make:
        def make(rank: int, size: int) -> State:
            mesh = init_device_mesh("cpu", (2, size // 2))
            weight = distribute_tensor(whole(64) * value, mesh, [Replicate(), Shard(0)], src_data_rank=None)
            return {"model": Holder(weight=weight)}

        return make

    shards = save(replicated(1.0), 8)
    assert layouts_read(replicated(0.0), 1, 4, shards) == [[1], [2, 3]]
    loaded = load(replicated(0.0), 4, shards)
    assert torch.equal(torch.cat([local(state["model"].weight) for state in loaded[:2]]), whole(64))


def test_a_layout_that_says_other_boxes_than_expected_is_not_believed() -> None:
    """Its parts are looked for on all ranks, and what does not cover the tensor is refused."""
    shards = save(model_of(1.0), 4)
    layouts = {rank: shard.layout for rank, shard in shards.items()}
    weight = next(tensor for tensor in layouts[3].tensors if tensor.name == "model.weight")
    weight.distributed.mesh_coordinate[:] = [2]
    with world(1, 2), pytest.raises(Exception, match="do not cover a tensor"):
        tree = make_tree(model_of(0.0)(1, 2), rank=1, world_size=2)
        prepare_restore(tree, layouts[1], shards[1].early, elastic=Elastic(Layouts.given(layouts)))
