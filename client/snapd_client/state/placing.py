"""Which box of a tensor each rank of a mesh holds, by its placements. Arithmetic on numbers; nothing is asked of torch.

A dimension that is sharded by several mesh dimensions is cut by one after the other, each time as `torch.chunk` does.
FSDP2 on top of tensor parallelism cuts what tensor parallelism has left, though its mesh dimension comes first:
`_StridedShard(dim, split_factor)` says so, its factor being the number of parts that the mesh dimensions to its right
make. So those are applied first, and what each rank holds is one box, also of sizes that nothing divides. (torch itself
reads the placements from left to right, which gives another part where a whole shard of tensor parallelism is smaller
than the ranks of FSDP: nine rows on 4 x 2 ranks.) Strided shards of any other kind are no boxes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .boxes import Box

Numbers = npt.NDArray[np.int64]
_PLACEMENT = re.compile(r"R|S\((-?\d+)\)|_S\((-?\d+), (\d+)\)")


class Split(NamedTuple):
    """A mesh dimension that cuts a dimension of the tensor. `factor`: of a strided shard; 1: a plain one."""

    mesh_dim: int
    dim: int
    factor: int


class Boxes(NamedTuple):
    """Of several ranks: a row for each, a column for each dimension of the tensor."""

    offsets: Numbers
    shapes: Numbers

    def box(self, number: int) -> Box:
        return Box(
            tuple(map(int, self.offsets[number].tolist())), tuple(map(int, self.shapes[number].tolist()))
        )

    def meeting(self, wanted: Box) -> list[int]:
        """The rows that have elements in common with a box."""
        low = np.maximum(self.offsets, np.array(wanted.offset, dtype=np.int64))
        ends = np.array(wanted.offset, dtype=np.int64) + np.array(wanted.shape, dtype=np.int64)
        high = np.minimum(self.offsets + self.shapes, ends)
        return [int(number) for number in np.nonzero((high > low).all(axis=1))[0]]


def boxes_of(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[str], coordinates: Numbers
) -> Boxes | None:
    """The boxes of the ranks at `coordinates` (a row for each rank); None: they are no boxes.

    Args:
        placements: as torch writes them, one for each mesh dimension: "R", "S(0)", "_S(0, 2)".
    """
    splits = _in_order(shape, mesh_shape, placements)
    if splits is None:
        return None
    count = len(coordinates)
    offsets = np.zeros((count, len(shape)), dtype=np.int64)
    shapes = np.tile(np.array(shape, dtype=np.int64), (count, 1))
    for split in splits:
        size, at = shapes[:, split.dim], coordinates[:, split.mesh_dim]
        step = -(-size // mesh_shape[split.mesh_dim])
        low, high = np.minimum(size, step * at), np.minimum(size, step * (at + 1))
        offsets[:, split.dim] += low
        shapes[:, split.dim] = high - low
    return Boxes(offsets, shapes)


def box_at(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[str], coordinate: Sequence[int]
) -> Box | None:
    """The box of the rank at one coordinate; an empty one lies at the tensor's beginning. None: it is no box."""
    if len(coordinate) != len(mesh_shape):
        return None
    found = boxes_of(
        shape, mesh_shape, placements, np.array([coordinate], dtype=np.int64).reshape(1, len(mesh_shape))
    )
    if found is None:
        return None
    box = found.box(0)
    return Box((0,) * len(shape), box.shape) if 0 in box.shape else box


def is_read_otherwise(shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[str]) -> bool:
    """Whether a DTensor that torch distributed by these placements, from left to right, would have parts of other sizes
    on some ranks than one that FSDP2 made. If all sizes are the same, so are the parts.
    """
    splits = _in_order(shape, mesh_shape, placements)
    if splits is None or all(split.factor == 1 for split in splits):
        return False
    coordinates = all_coordinates(mesh_shape)
    found = boxes_of(shape, mesh_shape, placements, coordinates)
    shapes = np.tile(np.array(shape, dtype=np.int64), (len(coordinates), 1))
    for split in sorted(splits):
        size, count = shapes[:, split.dim], mesh_shape[split.mesh_dim]
        at = coordinates[:, split.mesh_dim]
        pieces = [_chunk(size, split.factor, np.full_like(size, number)) for number in range(split.factor)]
        shapes[:, split.dim] = sum(_chunk(piece, count, at) for piece in pieces)
    return found is not None and not np.array_equal(found.shapes, shapes)


def _chunk(size: Numbers, count: int, number: Numbers) -> Numbers:
    """The size of the chunk of that number when `torch.chunk` makes `count` of them."""
    step = -(-size // count)
    found: Numbers = np.minimum(size, step * (number + 1)) - np.minimum(size, step * number)
    return found


def all_coordinates(mesh_shape: Sequence[int]) -> Numbers:
    """Of every rank of a mesh, in row-major order: as `mesh.mesh.flatten()` lists the ranks."""
    grid = np.indices(tuple(mesh_shape), dtype=np.int64)
    return grid.reshape(len(mesh_shape), -1).T


def _in_order(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[str]
) -> list[Split] | None:
    """The splits in the order in which they apply; None: some are of no kind that gives boxes."""
    if len(placements) != len(mesh_shape):
        return None
    splits: list[Split] = []
    for mesh_dim, text in enumerate(placements):
        match = _PLACEMENT.fullmatch(text)
        if match is None:
            return None
        if text == "R":
            continue
        dim = int(match[1] or match[2])
        splits.append(Split(mesh_dim, dim + len(shape) if dim < 0 else dim, int(match[3] or 1)))
    if any(split.dim >= len(shape) for split in splits):
        return None
    for number, split in enumerate(splits):
        right = math.prod(mesh_shape[s.mesh_dim] for s in splits[number + 1 :] if s.dim == split.dim)
        if split.factor != 1 and split.factor != right:
            return None
    plain = [split for split in splits if split.factor == 1]
    strided = [split for split in splits if split.factor != 1]
    return [*plain, *reversed(strided)]
