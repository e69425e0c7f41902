"""A snapshot that was cut otherwise: its layout as this rank would have written it, and where those bytes lie.

A run may go on with another number of ranks, another mesh, or DTensors where it had plain tensors. Names and global
shapes stay; what changes is which box of each tensor a rank holds. So the layout of one saved rank is taken as a base,
each of its tensors whose live counterpart has another box gets that box, and the bytes are put together from the saved
boxes that it meets (`boxes.py`). Everything after that, matching, claiming, copying, verifying, is as for any restore.

The state of an optimizer is cut as the parameter that it belongs to. What is no box of a whole, partial sums and
quantised blocks, cannot be cut otherwise; the matching then says so by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from snapd_proto import format_pb2 as pb
from torch.distributed.tensor import DTensor, Partial

from ..errors import IntegrityError
from .boxes import Box, Part, common_runs, contiguous
from .classes import type_name
from .names import Names, entries
from .tensors import LOCAL, dtypes
from .transfers import Elsewhere, check_bounds
from .wrappers import renames_for

DTENSOR = type_name(DTensor)


@dataclass(slots=True)
class Recut:
    """`fills`: region -> what it is put together from. `dropped`: tensors of the layout that stand for nothing now."""

    layout: pb.ShardLayout
    fills: dict[int, list[Part]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    next_alias: int = 0


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a tensor is cut here. `like`: the live DTensor whose mesh and placements it has; None: a plain tensor."""

    box: Box
    like: DTensor | None


def needs_recut(layout: pb.ShardLayout, state: Mapping[str, object], names: Names) -> bool:
    """Whether a tensor of the layout has a live counterpart with another box, or one whose wrapper differs."""
    if renames_for(layout, state, names):
        return True
    lives = _live_tensors(state, names)
    cuts = ((number, _cut_for(tensor, lives)) for number, tensor in _outer(layout))
    return any(cut is not None and _differs(layout, number, cut) for number, cut in cuts)


def recut(
    base: pb.ShardLayout,
    layouts: Mapping[int, pb.ShardLayout],
    state: Mapping[str, object],
    names: Names,
) -> Recut:
    """Cut `base`, the layout of one saved rank, as the live state is cut.

    Args:
        layouts: of all saved ranks, `base` among them (rank -> layout).
    Raises:
        IntegrityError: the saved boxes of a tensor do not cover it: shards are missing, or do not belong together.
    """
    for layout in layouts.values():
        check_bounds(layout)
    made = pb.ShardLayout()
    made.CopyFrom(base)
    result = Recut(made, next_alias=1 + max((tensor.storage_alias for tensor in made.tensors), default=0))
    lives = _live_tensors(state, names)
    saved = _SavedBoxes(base.rank, layouts)
    for number, tensor in list(_outer(made)):
        cut = _cut_for(tensor, lives)
        if cut is not None and _differs(made, number, cut) and saved.has(tensor.name):
            _cut_anew(result, number, cut, saved)
    return result


# --- what is live -------------------------------------------------------------------------------------
def _live_tensors(state: Mapping[str, object], names: Names) -> dict[str, torch.Tensor]:
    """Parameters, buffers and the mapping's own tensors, by the names that layouts use."""
    found: dict[str, torch.Tensor] = {
        path: item for path, item in entries(state, "") if isinstance(item, torch.Tensor)
    }
    for path, item in entries(state, ""):
        bound = names.modules.get(id(item))
        if bound is not None:
            found.update((f"{path}.{name}", tensor) for name, tensor in (*bound.buffers, *bound.parameters))
    found.update(names.by_name)
    return found


def _outer(layout: pb.ShardLayout) -> Iterator[tuple[int, pb.Tensor]]:
    """Tensors that are no component of another."""
    inner = {part.tensor for tensor in layout.tensors for part in tensor.subclass.components}
    return (entry for entry in enumerate(layout.tensors) if entry[0] not in inner)


def _cut_for(tensor: pb.Tensor, lives: Mapping[str, torch.Tensor]) -> _Cut | None:
    """How the live counterpart is cut, or the one of the parameter that the state belongs to; None: there is none."""
    shape = tuple(tensor.shape)
    live = lives.get(tensor.name)
    if live is not None:
        return _cut_of(live, shape) if tuple(live.shape) == shape else None
    owner = lives.get(tensor.parameter_name) if tensor.parameter_name else None
    if owner is None or len(shape) != owner.dim() or (not tensor.HasField("distributed") and not shape):
        return None
    if not tensor.HasField("distributed") and shape != tuple(owner.shape):
        return None  # a step counter, a factor of its own: every rank has it whole
    return _cut_of(owner, shape)


def _cut_of(live: torch.Tensor, shape: tuple[int, ...]) -> _Cut | None:
    """The box that this rank has of a tensor of that global shape, cut as `live` is."""
    if not isinstance(live, DTensor):
        return None if type(live) not in (torch.Tensor, torch.nn.Parameter) else _Cut(_whole(shape), None)
    if any(isinstance(placement, Partial) for placement in live.placements):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(
        torch.Size(shape), live.device_mesh, live.placements
    )
    if 0 in local:  # its offset is of no account, and lies beyond the end
        offset = tuple(0 for _ in shape)
    return _Cut(Box(tuple(map(int, offset)), tuple(map(int, local))), live)


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


# --- what was saved -----------------------------------------------------------------------------------
def _saved_box(layout: pb.ShardLayout, number: int) -> tuple[Box, pb.Tensor] | None:
    """(box, the tensor that has its bytes) of an outer tensor; None: it is no box of a whole."""
    tensor = layout.tensors[number]
    if not tensor.HasField("subclass"):
        return _whole(tuple(tensor.shape)), tensor
    if not tensor.HasField("distributed") or len(tensor.subclass.components) != 1:
        return None
    if any(text.startswith("P") for text in tensor.distributed.placements):
        return None
    local = layout.tensors[tensor.subclass.components[0].tensor]
    if local.HasField("subclass"):
        return None
    offset = tuple(tensor.local_offset)
    return Box(offset if 0 not in local.shape else (0,) * len(offset), tuple(local.shape)), local


def _differs(layout: pb.ShardLayout, number: int, cut: _Cut) -> bool:
    """Whether the saved tensor must be cut anew to stand for one that is cut like this."""
    tensor = layout.tensors[number]
    if cut.like is None:
        return tensor.HasField("distributed")
    if not tensor.HasField("distributed"):
        return not tensor.HasField("subclass")
    saved = tensor.distributed
    mesh = cut.like.device_mesh
    return (
        list(saved.mesh_shape) != list(mesh.shape)
        or list(saved.placements) != [str(placement) for placement in cut.like.placements]
        or list(saved.mesh_coordinate) != list(mesh.get_coordinate() or ())
    )


class _SavedBoxes:
    """Every saved box of every tensor, by name; those of the base first, then by rank."""

    def __init__(self, base: int, layouts: Mapping[int, pb.ShardLayout]) -> None:
        self._layouts = layouts
        self._order = sorted(layouts, key=lambda rank: (rank != base, rank))
        self._base = base
        self._numbers = {
            rank: {tensor.name: number for number, tensor in _outer(layout)}
            for rank, layout in layouts.items()
        }
        self._elsewhere: dict[int, Elsewhere] = {}

    def has(self, name: str) -> bool:
        number = self._numbers[self._base].get(name)
        return number is not None and _saved_box(self._layouts[self._base], number) is not None

    def parts(self, name: str, wanted: Box, itemsize: int) -> list[Part]:
        """What the wanted box is put together from: each byte once."""
        found: list[Part] = []
        used: set[Box] = set()
        count = 0
        for rank in self._order:
            if count >= wanted.size:
                break
            number = self._numbers[rank].get(name)
            saved = None if number is None else _saved_box(self._layouts[rank], number)
            if saved is None or saved[0] in used or 0 in saved[0].shape:
                continue
            box, tensor = saved
            used.add(box)
            runs = common_runs(box, tensor.strides, wanted, itemsize)
            if runs is not None:
                holder, first = self._place(rank, tensor)
                found.append(Part(holder, runs._replace(there=runs.there + first)))
                count += runs.total_nbytes // itemsize
        if count != wanted.size:
            raise IntegrityError(
                "the shards of the snapshot do not cover a tensor",
                tensor=name,
                found=count,
                wanted=wanted.size,
            )
        return found

    def _place(self, rank: int, tensor: pb.Tensor) -> Any:
        """(rank whose shard has the bytes, shard offset of the tensor's first element)."""
        layout = self._layouts[rank]
        region = layout.regions[tensor.region]
        holder, offset = rank, region.shard_offset
        if region.held_by_rank_plus_one:
            elsewhere = self._elsewhere.get(rank)
            if elsewhere is None:
                elsewhere = self._elsewhere[rank] = Elsewhere(layout, self._layouts)
            holder, offset = elsewhere.shard_offset(tensor.region, region)
        return holder, offset + tensor.region_offset


# --- the new cut --------------------------------------------------------------------------------------
def _cut_anew(result: Recut, number: int, cut: _Cut, saved: _SavedBoxes) -> None:
    layout = result.layout
    tensor = layout.tensors[number]
    itemsize = dtypes[tensor.dtype].itemsize
    parts = saved.parts(tensor.name, cut.box, itemsize)
    region = len(layout.regions)
    layout.regions.add(nbytes=cut.box.size * itemsize, when=pb.Region.LAZY, range_name="recut")
    result.fills[region] = parts
    for component in tensor.subclass.components:
        result.dropped.add(component.tensor)
    tensor.ClearField("subclass")
    tensor.ClearField("distributed")
    tensor.ClearField("live_strides")
    tensor.ClearField("replica_set")
    if cut.like is None:
        _give_bytes(tensor, region, cut.box.shape, itemsize, result)
        return
    shape = list(tensor.shape)
    local = pb.Tensor()
    local.CopyFrom(tensor)
    local.name = f"{tensor.name}.{LOCAL}"
    _give_bytes(local, region, cut.box.shape, itemsize, result)
    for name in ("region", "region_offset", "nbytes", "storage_alias", "storage_offset"):
        tensor.ClearField(name)
    tensor.strides[:] = contiguous(shape)
    tensor.global_shape[:] = shape
    tensor.local_offset[:] = cut.box.offset
    tensor.subclass.type_name = DTENSOR
    tensor.subclass.components.add(attribute=LOCAL, tensor=len(layout.tensors))
    _describe(tensor.distributed, cut.like)
    layout.tensors.append(local)


def _give_bytes(tensor: pb.Tensor, region: int, shape: tuple[int, ...], itemsize: int, result: Recut) -> None:
    """Row-major, at the beginning of a region and of a storage of its own."""
    tensor.shape[:] = shape
    tensor.strides[:] = contiguous(shape)
    tensor.region, tensor.region_offset = region, 0
    tensor.nbytes = math.prod(shape) * itemsize
    tensor.storage_alias, tensor.storage_offset = result.next_alias, 0
    result.next_alias += 1


def _describe(message: pb.Distributed, like: DTensor) -> None:
    mesh = like.device_mesh
    message.mesh_shape.extend(mesh.shape)
    message.mesh_dim_names.extend(mesh.mesh_dim_names or ())
    message.placements.extend(str(placement) for placement in like.placements)
    message.mesh_coordinate.extend(mesh.get_coordinate() or ())
    message.mesh_ranks.extend(mesh.mesh.flatten().tolist())
