"""The boxes of ranks on a mesh: torch's own, and for FSDP on tensor parallelism those that the ranks really have."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from snapd_client.state.boxes import Box
from snapd_client.state.placing import all_coordinates, box_at, boxes_of, is_read_otherwise
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

MESHES = [(1,), (2,), (5,), (2, 2), (2, 3), (3, 2), (2, 2, 2)]
SHAPES = [(1,), (5,), (7,), (12,), (4, 6), (5, 7), (1, 9), (3, 4, 5)]


def coordinates(mesh: tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[list[int]] = all_coordinates(mesh).tolist()
    assert found == [list(one) for one in itertools.product(*map(range, mesh))]
    return [tuple(one) for one in found]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_shards_are_where_torch_says(shape: tuple[int, ...], mesh: tuple[int, ...]) -> None:
    kinds: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
    for placements in itertools.product(kinds, repeat=len(mesh)):
        texts = [str(placement) for placement in placements]
        for at in coordinates(mesh):
            local, offset = _compute_local_shape_and_global_offset(shape, mesh, list(at), placements)
            box = box_at(shape, mesh, texts, at)
            expected = Box(tuple(offset) if 0 not in local else (0,) * len(shape), tuple(local))
            assert box == expected, (placements, at)


def real_rows(rows: int, mesh: tuple[int, ...], at: tuple[int, ...]) -> torch.Tensor:
    """FSDP over what tensor parallelism has left: as both libraries cut, with torch.chunk."""
    left = torch.arange(rows)
    for size, number in reversed(list(zip(mesh, at, strict=True))):
        parts = left.chunk(size)
        left = parts[number] if number < len(parts) else left[:0]
    return left


@pytest.mark.parametrize("mesh", [(2, 2), (3, 2), (4, 2), (2, 3), (3, 4), (2, 2, 2), (3, 2, 2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 8, 9, 13, 24])
def test_strided_shards_are_what_fsdp_leaves_of_tensor_parallelism(rows: int, mesh: tuple[int, ...]) -> None:
    texts = [f"_S(0, {math.prod(mesh[number + 1 :])})" for number in range(len(mesh) - 1)] + ["S(0)"]
    seen = []
    for at in coordinates(mesh):
        box = box_at((rows, 3), mesh, texts, at)
        assert box is not None
        expected = real_rows(rows, mesh, at)
        assert box.shape == (len(expected), 3)
        if len(expected):
            assert list(range(box.offset[0], box.offset[0] + box.shape[0])) == expected.tolist()
        seen += expected.tolist()
    assert sorted(seen) == list(range(rows))


def test_who_cut_a_tensor_shows_in_the_sizes_of_its_parts() -> None:
    """torch distributes by strided placements from left to right. Where no rank's part has another size than what FSDP2
    leaves it, all parts are the same ones.
    """
    differing = 0
    for data, model, rows in itertools.product(range(1, 6), range(2, 6), range(1, 30)):
        placements = [_StridedShard(0, split_factor=model), Shard(0)]
        texts = [str(placement) for placement in placements]
        assert texts == [f"_S(0, {model})", "S(0)"]
        pairs = []
        for at in coordinates((data, model)):
            found = _compute_local_shape_and_global_offset((rows,), (data, model), list(at), placements)
            pairs.append((box_at((rows,), (data, model), texts, at), found))
        is_other = any(box is None or box.shape != tuple(local) for box, (local, _) in pairs)
        assert is_other == is_read_otherwise((rows,), (data, model), texts), (rows, data, model)
        differing += is_other
        if not is_other:
            same = (box.offset == tuple(offset) for box, (local, offset) in pairs if box and local[0])
            assert all(same), (rows, data, model)
    assert differing > 10


@pytest.mark.parametrize(
    "texts",
    [
        ["_S(0, 2)", "R"],
        ["_S(0, 3)", "S(0)"],
        ["P(sum)", "S(0)"],
        ["S(0)", "_S(0, 2)"],
        ["S(0)"],
        ["S(2)", "R"],
    ],
)
def test_what_is_no_box_is_none(texts: list[str]) -> None:
    assert box_at((8, 8), (2, 2), texts, (0, 1)) is None


def test_which_ranks_meet_a_box() -> None:
    boxes = boxes_of((10, 4), (4,), ["S(0)"], all_coordinates((4,)))
    assert boxes is not None
    assert boxes.box(1) == Box((3, 0), (3, 4))
    assert boxes.meeting(Box((2, 1), (2, 2))) == [0, 1]
    assert boxes.meeting(Box((9, 0), (1, 4))) == [3]
    assert boxes.meeting(Box((0, 0), (0, 4))) == []
