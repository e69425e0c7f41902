"""A snapshot of some ranks, put together anew by others, in one process: each rank is pretended in its turn."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from snapd_client.errors import RestoreMismatch
from snapd_client.state.apply import is_cut_alike, names_of, prepare_restore
from snapd_client.state.layouts import Layouts
from snapd_client.state.resharding import Elastic
from snapd_native import CopyPlan
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.loopback import Loopback, Snapshot, make_tree

CHUNK_BYTES = 1024
State = dict[str, Any]
Make = Callable[[int, int], State]  # (rank, world size) -> the user's mapping


@contextlib.contextmanager
def world(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    _clear_sharding_prop_cache()  # it holds the mesh as the rank before saw it
    try:
        yield
    finally:
        dist.destroy_process_group()


def save(make: Make, size: int, **options: object) -> dict[int, Snapshot]:
    shards = {}
    for rank in range(size):
        with world(rank, size):
            tree = make_tree(make(rank, size), rank=rank, world_size=size, **options)
            shards[rank] = Loopback(tree, chunk_bytes=CHUNK_BYTES, node_ranks=range(size)).capture(3)
    return shards


def load(make: Make, size: int, shards: dict[int, Snapshot]) -> list[State]:
    """What each rank of another world has afterwards."""
    found = []
    for rank in range(size):
        with world(rank, size):
            state = make(rank, size)
            fill(make_tree(state, rank=rank, world_size=size), shards)
            found.append(state)
    return found


def fill(tree: Any, shards: dict[int, Snapshot]) -> None:
    base = tree.rank % len(shards)
    layouts = {rank: shard.layout for rank, shard in shards.items()}
    pending = prepare_restore(
        tree, layouts[base], shards[base].early, elastic=Elastic(Layouts.given(layouts))
    )
    bases = array("Q", [
        shards[rank].data.ctypes.data + chunk * CHUNK_BYTES for rank, chunk in pending.sources
    ])  # fmt: skip
    plan = CopyPlan(*pending.plan)
    for first, count in pending.pieces_of_chunk:
        if count:
            plan.run(bases, pending.destinations, first, count)
    pending.finish()


def cut(whole: torch.Tensor, *placements: Placement) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(whole, mesh, placements or [Shard(0)], src_data_rank=None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([local(tensor) for tensor in tensors])


def whole(rows: int, columns: int = 3) -> torch.Tensor:
    return torch.arange(1.0, 1 + rows * columns).reshape(rows, columns)


class Holder(nn.Module):
    """A module of given parameters."""

    def __init__(self, **parameters: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))


class Factored(torch.optim.Optimizer):
    """One whose state has other shapes than its parameters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})


def with_state(make_state: Callable[[DTensor], dict[str, torch.Tensor]], value: float, rows: int = 5) -> Make:
    def make(rank: int, size: int) -> State:
        model = Holder(weight=cut(whole(rows) * value))
        optimizer = Factored(model.parameters())
        if value:
            optimizer.state[model.weight] = make_state(model.weight)
        return {"model": model, "optimizer": optimizer}

    return make


def states(loaded: list[State], field: str) -> list[torch.Tensor]:
    return [state["optimizer"].state[state["model"].weight][field] for state in loaded]


@pytest.mark.parametrize(("saved", "wanted"), [(4, 3), (4, 1), (2, 4), (3, 4)])
def test_five_rows_on_more_ranks_than_share_them(saved: int, wanted: int) -> None:
    shards = save(with_state(lambda weight: {"ema": weight.detach() * 2}, 1.0), saved)
    loaded = load(with_state(lambda weight: {}, 0.0), wanted, shards)
    assert torch.equal(joined([state["model"].weight for state in loaded]), whole(5))
    assert torch.equal(joined(states(loaded, "ema")), whole(5) * 2)


@pytest.mark.parametrize("wanted", [1, 3, 4])
def test_state_of_fewer_dimensions_than_its_parameter_is_cut_like_it(wanted: int) -> None:
    rows = torch.arange(10.0, 15.0)
    shards = save(with_state(lambda weight: {"rows": cut(rows)}, 1.0), 2)
    found = states(load(with_state(lambda weight: {}, 0.0), wanted, shards), "rows")
    assert torch.equal(joined(found), rows)
    assert all(tensor.placements == (Shard(0),) for tensor in found if isinstance(tensor, DTensor))


def test_state_that_all_ranks_have_stays_with_all_of_them() -> None:
    columns = torch.arange(20.0, 23.0).reshape(1, 3)
    shards = save(with_state(lambda weight: {"columns": cut(columns, Replicate())}, 1.0), 2)
    for tensor in states(load(with_state(lambda weight: {}, 0.0), 3, shards), "columns"):
        assert isinstance(tensor, DTensor) and tensor.placements == (Replicate(),)
        assert torch.equal(local(tensor), columns)


def partial_sum(weight: DTensor) -> dict[str, torch.Tensor]:
    sums = torch.full((3,), 1.0 + dist.get_rank())
    return {"sums": DTensor.from_local(sums, weight.device_mesh, [Partial()], run_check=False)}


def of_local_size(weight: DTensor) -> dict[str, torch.Tensor]:
    return {"flat": local(weight).detach().flatten() + 1}


@pytest.mark.parametrize(("make_state", "field"), [(partial_sum, "sums"), (of_local_size, "flat")])
def test_state_that_cannot_be_cut_otherwise_is_refused_by_name(make_state: Any, field: str) -> None:
    shards = save(with_state(make_state, 1.0), 2)
    with pytest.raises(RestoreMismatch) as refused:
        load(with_state(lambda weight: {}, 0.0), 3, shards)
    assert any(field in name for name in refused.value.reshaped), refused.value


def test_what_ranks_have_each_for_itself_is_not_mixed() -> None:
    """Gradients before they are reduced differ between ranks."""

    def saved(rank: int, size: int) -> State:
        model = Holder(weight=whole(6))
        model.weight.grad = torch.full((6, 3), 1.0 + rank)
        return {"model": model}

    def here(rank: int, size: int) -> State:
        return {"model": Holder(weight=cut(torch.zeros(6, 3)))}

    loaded = load(here, 3, save(saved, 2, gradients=True))
    assert len(set(joined([state["model"].weight.grad for state in loaded]).flatten().tolist())) == 1


class Tied(nn.Module):
    """A weight under two names, large enough to be shared out, and state of the module's own."""

    def __init__(self, weight: torch.Tensor, said: str) -> None:
        super().__init__()
        self.tokens, self.head = Holder(weight=weight), Holder(weight=weight)
        self.head.weight = self.tokens.weight
        self.other = Holder(weight=weight.detach() + 1)
        self.said = said

    def get_extra_state(self) -> object:
        return self.said

    def set_extra_state(self, state: Any) -> None:
        self.said = state


def tied_saved(rank: int, size: int) -> State:
    return {"model": DistributedDataParallel(Tied(whole(400), "saved"))}


def test_replicas_that_share_out_tied_weights_under_a_wrapper_are_cut() -> None:
    shards = save(tied_saved, 2)
    assert any(region.held_by_rank_plus_one for region in shards[0].layout.regions)
    assert any(region.held_by_rank_plus_one for region in shards[1].layout.regions)

    def here(rank: int, size: int) -> State:
        return {"model": Tied(cut(torch.zeros(400, 3)), "")}

    loaded = [state["model"] for state in load(here, 3, shards)]
    assert torch.equal(joined([model.tokens.weight for model in loaded]), whole(400))
    assert torch.equal(joined([model.other.weight for model in loaded]), whole(400) + 1)
    assert all(model.head.weight is model.tokens.weight and model.said == "saved" for model in loaded)


def test_a_wrapper_that_comes_back_is_renamed_too() -> None:
    def plain(rank: int, size: int) -> State:
        return {"model": Tied(whole(400), "saved")}

    shards = save(plain, 1)
    with world(0, 1):
        state = {"model": torch.compile(Tied(torch.zeros(400, 3), ""))}
        tree = make_tree(state)
        assert not is_cut_alike(tree, shards[0].layout, names_of(tree))
        fill(tree, shards)
        assert torch.equal(state["model"].head.weight, whole(400)) and state["model"].said == "saved"


def test_two_saved_names_are_not_taken_for_one() -> None:
    """A wrapper's word is also what a part of the model is called."""

    class Both(nn.Module):
        def __init__(self, *, is_nested: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            if is_nested:
                self.module = Holder(weight=torch.full((4,), 2.0))

    shards = save(lambda rank, size: {"model": Both(is_nested=True)}, 1)
    with pytest.raises(RestoreMismatch) as refused:
        load(lambda rank, size: {"model": Both(is_nested=False)}, 1, shards)
    assert refused.value.missing == ["model.module.weight"], refused.value


def test_buffers_that_are_distributed_and_frozen_parameters() -> None:
    def make(value: float) -> Make:
        def build(rank: int, size: int) -> State:
            model = Holder(base=cut(whole(7) * value), adapter=cut(whole(7, 2) * value))
            model.base.requires_grad_(False)
            model.register_buffer("running", cut(whole(7, 4) * value, Shard(1)))
            return {"model": model, "optimizer": torch.optim.SGD([model.adapter], lr=0.1)}

        return build

    loaded = [state["model"] for state in load(make(0.0), 3, save(make(1.0), 2))]
    assert torch.equal(joined([model.base for model in loaded]), whole(7))
    assert torch.equal(joined([model.adapter for model in loaded]), whole(7, 2))
    assert torch.equal(torch.cat([local(model.running) for model in loaded], dim=1), whole(7, 4))
