"""Where bytes lie in the shard: ranges, alignment, aliasing, what is taken early, when a layout no longer fits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from snapd_client.errors import CaptureError
from snapd_client.state.layout import build_layout
from snapd_native import ZERO_FILL
from torch import nn

from tests.support.loopback import CHUNK_BYTES, Loopback, Snapshot, make_tree, restore


def trained(frozen: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 127), nn.BatchNorm1d(127), nn.Linear(127, 33))
    if frozen:
        model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(torch.randn(4, 96)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def capture(state: Any, **options: Any) -> tuple[Loopback, Snapshot]:
    loopback = Loopback(make_tree(state, **options))
    return loopback, loopback.capture()


def ranges_of(snapshot: Snapshot) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    layout = snapshot.layout
    for tensor in layout.tensors:
        if not tensor.HasField("subclass"):
            found.setdefault(layout.regions[tensor.region].range_name, []).append(tensor.name)
    return found


def test_ranges_by_what_the_bytes_are_for() -> None:
    model, optimizer = trained(frozen=True)
    loopback, snapshot = capture({"model": model, "optimizer": optimizer})
    found = ranges_of(snapshot)
    assert found["frozen"] == ["model.0.weight", "model.0.bias"]
    assert set(found["parameters"]) == {"model.1.weight", "model.1.bias", "model.2.weight", "model.2.bias"}
    assert set(found["early"]) >= {
        "model.1.running_mean",
        "model.1.running_var",
        "model.1.num_batches_tracked",
    }
    assert "optimizer.state.model.2.weight.step" in found["early"]
    assert len(found["exp_avg"]) == len(found["exp_avg_sq"]) == 4
    names = [entry.name for entry in snapshot.layout.ranges]
    assert names == ["early", "frozen", "parameters", *sorted(names[3:])]
    assert loopback.layout is not None
    frozen = loopback.layout.unchanging_regions
    assert [loopback.layout.region_names[region] for region in frozen] == found["frozen"]
    assert len(loopback.layout.unchanging_chunks) == 1


def test_every_range_begins_on_a_chunk_and_every_region_at_64_bytes() -> None:
    model, optimizer = trained()
    loopback, snapshot = capture({"model": model, "optimizer": optimizer})
    layout = snapshot.layout
    covered: dict[int, int] = {}
    for entry in layout.ranges:
        assert entry.shard_offset % CHUNK_BYTES == 0
        first = entry.shard_offset // CHUNK_BYTES
        for index in range(-(-entry.nbytes // CHUNK_BYTES)):
            covered[first + index] = min(CHUNK_BYTES, entry.nbytes - index * CHUNK_BYTES)
    assert loopback.layout is not None
    lengths = list(loopback.layout.chunk_nbytes)
    assert lengths[0] == snapshot.layout_nbytes
    assert covered == dict(enumerate(lengths[1:], 1)), (
        "chunks that belong to no range, or the other way round"
    )
    by_start = sorted(layout.regions, key=lambda region: region.shard_offset)
    for region, following in itertools.pairwise(by_start):
        assert region.shard_offset % 64 == 0
        assert region.shard_offset + region.nbytes <= following.shard_offset


def test_every_byte_of_every_chunk_is_written_once() -> None:
    model, optimizer = trained()
    loopback, _ = capture({"model": model, "optimizer": optimizer})
    layout = loopback.layout
    assert layout is not None
    written = {chunk: bytearray(nbytes) for chunk, nbytes in enumerate(layout.chunk_nbytes)}
    written[0] = bytearray(b"\1" * layout.chunk_nbytes[0])
    values = layout.early_values_offset // CHUNK_BYTES
    written[values][: layout.early_values_capacity] = b"\1" * layout.early_values_capacity
    for plan in (layout.early, layout.lazy):
        for chunk, start, nbytes in zip(plan.dst_index, plan.dst_offset, plan.nbytes, strict=True):
            assert not any(written[chunk][start : start + nbytes]), "written twice"
            written[chunk][start : start + nbytes] = b"\1" * nbytes
    assert all(all(chunk) for chunk in written.values()), "a byte that nobody writes"
    assert ZERO_FILL in layout.lazy.src_index, "no gap: the test is void"


def test_equal_state_gives_equal_chunks() -> None:
    one, other = trained(), trained()
    loopback, first = capture({"model": one[0], "optimizer": one[1]})
    _, second = capture({"model": other[0], "optimizer": other[1]})
    assert loopback.layout is not None
    for number, nbytes in enumerate(loopback.layout.chunk_nbytes):
        if (
            number != loopback.layout.early_values_offset // CHUNK_BYTES
        ):  # holds the wall clock and generators
            assert first.chunk(number, nbytes) == second.chunk(number, nbytes), f"chunk {number}"


def test_tied_weights_are_stored_once() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    model[1].weight = model[0].weight
    loopback, snapshot = capture({"model": model})
    assert [tensor.name for tensor in snapshot.layout.tensors] == ["model.0.weight"]
    assert loopback.layout is not None and loopback.layout.state_nbytes == 50 * 8 * 4
    fields = snapshot.layout.skeleton.mapping.values[0].mapping.values[0].opaque.fields.mapping
    assert [key.text for key in fields.keys] == ["0.weight", "1.weight"]


def test_views_of_one_storage_share_their_bytes() -> None:
    flat = torch.arange(100.0)
    state = {
        "whole": flat,
        "middle": flat[20:40],
        "matrix": flat[:90].view(9, 10),
        "apart": torch.arange(3.0),
    }
    loopback, snapshot = capture(state)
    tensors = {tensor.name: tensor for tensor in snapshot.layout.tensors}
    assert tensors["whole"].region == tensors["middle"].region == tensors["matrix"].region
    assert tensors["middle"].region_offset == 80 and tensors["apart"].region != tensors["whole"].region
    assert tensors["whole"].storage_alias == tensors["middle"].storage_alias != tensors["apart"].storage_alias
    assert loopback.layout is not None and loopback.layout.state_nbytes == 412
    flat.zero_()
    restore(loopback.tree, snapshot)
    assert flat.tolist() == list(map(float, range(100))) and state["matrix"].data_ptr() == flat.data_ptr()


def test_disjoint_views_of_one_storage_have_regions_of_their_own() -> None:
    flat = torch.arange(100.0)
    loopback, snapshot = capture({"left": flat[:50], "right": flat[50:]})
    tensors = {tensor.name: tensor for tensor in snapshot.layout.tensors}
    assert tensors["left"].region != tensors["right"].region
    assert tensors["left"].storage_alias == tensors["right"].storage_alias
    assert tensors["right"].storage_offset - tensors["left"].storage_offset == 200
    flat.zero_()
    restore(loopback.tree, snapshot)
    assert flat.tolist() == list(map(float, range(100)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(60.0).view(6, 10).t(),
        lambda: torch.arange(60.0).view(6, 10)[:, ::2],
        lambda: torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        lambda: torch.arange(10.0).expand(4, 10),
        lambda: torch.arange(1000.0)[::100],
        lambda: torch.randn(3, dtype=torch.complex64).conj(),
        lambda: torch.zeros(0, 3),
        lambda: torch.tensor(3.5),
    ],
)
def test_strided_tensors_come_back_with_their_values(make: Any) -> None:
    saved = make()
    _, snapshot = capture({"tensor": saved})
    live = make()
    if live.numel() and not live.is_conj():
        live.untyped_storage().fill_(0)
    restore(make_tree({"tensor": live}), snapshot)
    assert torch.equal(saved, live) and saved.stride() == live.stride()


def test_tensors_of_sparse_spans_are_gathered_early() -> None:
    _, snapshot = capture({"tensor": torch.arange(100000.0)[::1000]})
    assert snapshot.layout.regions[0].range_name == "early" and snapshot.layout.regions[0].nbytes == 400


def test_buffers_are_taken_early_unless_they_are_large() -> None:
    class Module(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.register_buffer("large", torch.zeros(size), persistent=False)
            self.register_buffer("small", torch.zeros(10))

    assert set(ranges_of(capture({"model": Module(1000)})[1])["early"]) == {"model.large", "model.small"}
    found = ranges_of(capture({"model": Module(1 << 19)})[1])
    assert found["early"] == ["model.small"] and found["other"] == ["model.large"]


def test_tensors_without_a_counter_are_taken_early() -> None:
    with torch.inference_mode():
        frozen = torch.ones(5000)
    loopback, snapshot = capture({"plain": torch.ones(5000), "inference": frozen})
    assert ranges_of(snapshot) == {"other": ["plain"], "early": ["inference"]}
    assert loopback.layout is not None
    binding = loopback.layout.bind(loopback.tree.walk())
    assert binding is not None and binding.versions == [0, None]


def test_a_tensor_can_be_moved_to_the_early_part() -> None:
    model, optimizer = trained()
    loopback, _ = capture({"model": model, "optimizer": optimizer})
    loopback.tree.force_early("model.0.weight")
    snapshot = loopback.capture()
    assert loopback.layouts_built == 2
    assert "model.0.weight" in ranges_of(snapshot)["early"]
    loopback.capture()
    assert loopback.layouts_built == 2


def test_groups_of_regions_follow_their_optimizers() -> None:
    one, two, three = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
    first, second = torch.optim.AdamW(one.parameters()), torch.optim.AdamW(two.parameters())
    for model, optimizer in ((one, first), (two, second)):
        model(torch.ones(2, 9)).sum().backward()
        optimizer.step()
    loopback, _ = capture({"models": [one, two, three], "optimizers": [first, second]})
    layout = loopback.layout
    assert layout is not None
    groups = dict(zip(layout.region_names, layout.region_group, strict=True))
    assert groups["models.0.weight"] == 1 == groups["optimizers.0.state.models.0.weight.exp_avg"]
    assert groups["models.1.weight"] == 2 == groups["optimizers.1.state.models.1.weight.exp_avg"]
    assert groups["models.2.weight"] == 0
    for region, group in zip(layout.lazy.src_index, layout.lazy.group, strict=True):
        assert region == ZERO_FILL or group == layout.region_group[region]


def test_writes_and_moves_since_the_binding_are_named_by_group() -> None:
    model, optimizer = trained()
    loopback, _ = capture({"model": model, "optimizer": optimizer})
    walk = loopback.tree.walk()
    _, binding = loopback.fit(walk)
    assert binding.changed_since(walk, {0, 1}) == []
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].running_mean.add_(1)  # early: its copy is done
        optimizer.state[model[2].weight]["exp_avg"].data = torch.zeros(33, 127)
    assert binding.changed_since(walk, {0}) == []
    assert binding.changed_since(walk, {1}) == ["model.0.weight", "optimizer.state.model.2.weight.exp_avg"]


@pytest.mark.parametrize(
    "change",
    [
        lambda flat, view: setattr(view, "data", torch.zeros(20)),
        lambda flat, view: setattr(view, "data", flat.data[1:21]),
        lambda flat, view: flat.resize_(200).zero_(),  # what resize_ adds is not initialised
    ],
)
def test_a_layout_is_given_up_when_shapes_or_aliasing_change(change: Any) -> None:
    flat = torch.arange(100.0)
    view = flat[10:30]
    loopback, _ = capture({"flat": flat, "view": view})
    change(flat, view)
    snapshot = loopback.capture()
    assert loopback.layouts_built == 2
    wanted = flat.clone(), view.clone()
    live = {"flat": torch.zeros(flat.shape), "view": torch.zeros(view.shape)}
    restore(make_tree(live), snapshot)
    assert torch.equal(live["flat"], wanted[0]) and torch.equal(live["view"], wanted[1])


def test_another_shape_over_the_same_memory_is_found_after_the_copy() -> None:
    """Nothing that is compared on the training thread tells; the capture is thrown away and the next one is right."""
    flat = torch.arange(100.0)
    view = flat[10:30]
    loopback, _ = capture({"flat": flat, "view": view})
    view.data = flat.data[10:29]
    walk = loopback.tree.walk()
    _, binding = loopback.fit(walk)
    assert loopback.layouts_built == 1
    assert binding.changed_since(walk, {0}) == ["view"]
    snapshot = loopback.capture()
    assert loopback.layouts_built == 2
    assert [list(tensor.shape) for tensor in snapshot.layout.tensors] == [[100], [19]]
    assert binding.changed_since(walk, {0}) == ["view"]


def test_early_values_that_outgrow_their_room_get_a_new_layout() -> None:
    state: dict[str, Any] = {"history": [0.5], "tensor": torch.ones(3)}
    loopback, _ = capture(state)
    state["history"].extend(range(5000))
    snapshot = loopback.capture()
    assert loopback.layouts_built == 2
    live: dict[str, Any] = {"history": [], "tensor": torch.zeros(3)}
    restore(make_tree(live), snapshot)
    assert live["history"] == state["history"]


def test_a_layout_larger_than_a_chunk() -> None:
    state = {f"tensor {number}": torch.full((3,), float(number)) for number in range(200)}
    loopback = Loopback(make_tree(state), chunk_bytes=4096)
    snapshot = loopback.capture()
    assert snapshot.layout_nbytes > 2 * 4096 and snapshot.early_values_offset % 4096 == 0
    live = {name: torch.zeros(3) for name in state}
    restore(make_tree(live), snapshot)
    assert all(torch.equal(live[name], state[name]) for name in state)


def test_impossible_chunk_sizes_are_refused() -> None:
    tree = make_tree({"tensor": torch.ones(3)})
    for size in (0, 32, 100):
        with pytest.raises(CaptureError, match="chunk size"):
            build_layout(tree, tree.walk(), chunk_bytes=size)
