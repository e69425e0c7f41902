"""A snapshot that was cut otherwise: its layout as this rank would have written it, and where those bytes lie.

A run may go on with another number of ranks, another mesh, or DTensors where it had plain tensors. Names and global
shapes stay; what changes is which box of each tensor a rank holds. So the layout of one saved rank is taken as a base,
each of its tensors whose live counterpart has another box gets that box, and the bytes are put together from the saved
boxes that it meets (`boxes.py`). Everything after that, matching, claiming, copying, verifying, is as for any restore.

The state of an optimizer is cut as the parameter that it belongs to, if it was cut as that one in the snapshot, and is
whole on every rank if not. What is no box of a whole, partial sums and quantised blocks, cannot be cut otherwise; it is
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from snapd_proto import format_pb2 as pb
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

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
    """`fills`: region -> what it is put together from. `dropped`: tensors of the layout that stand for nothing now.
    `refused`: (name, why) of those that would have to be cut otherwise and cannot be.
    """

    layout: pb.ShardLayout
    fills: dict[int, list[Part]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    refused: list[tuple[str, str]] = field(default_factory=list)
    next_alias: int = 0


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a tensor is cut here. `mesh`: None: a plain tensor."""

    box: Box
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()


def needs_recut(layout: pb.ShardLayout, state: Mapping[str, object], names: Names) -> bool:
    """Whether a tensor of the layout has a live counterpart with another box, or one whose wrapper differs."""
    if renames_for(layout, state, names):
        return True
    cuts = _Cuts(layout, _live_tensors(state, names))
    found = ((number, cuts.of(tensor)) for number, tensor in _outer(layout))
    return any(isinstance(cut, str) or (cut and _differs(layout, number, cut)) for number, cut in found)


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
    cuts = _Cuts(base, _live_tensors(state, names))
    saved = _SavedBoxes(base.rank, layouts)
    for number, tensor in _outer(base):
        cut = cuts.of(tensor)
        if isinstance(cut, str):
            result.refused.append((tensor.name, cut))
        elif cut is not None and _differs(base, number, cut) and saved.has(tensor.name):
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


class _Cuts:
    """How the tensors of a layout have to be cut here."""

    def __init__(self, layout: pb.ShardLayout, lives: Mapping[str, torch.Tensor]) -> None:
        self._layout, self._lives = layout, lives
        self._parameters = {
            tensor.parameter_name: number for number, tensor in _outer(layout) if tensor.is_parameter
        }

    def of(self, tensor: pb.Tensor) -> _Cut | str | None:
        """As the live counterpart is, or the parameter that the state belongs to. None: just as it was saved; a text:
        why that cannot be.
        """
        shape = tuple(tensor.shape)
        live = self._lives.get(tensor.name)
        if live is not None:
            return _cut_of(live, shape) if tuple(live.shape) == shape else None
        owner = self._lives.get(tensor.parameter_name) if tensor.parameter_name else None
        number = self._parameters.get(tensor.parameter_name)
        if owner is None or number is None:
            return None
        cut = _cut_of(owner, tuple(owner.shape))
        if cut is None or not _differs(self._layout, number, cut):
            return None
        return self._of_state(tensor, owner, self._layout.tensors[number])

    def _of_state(self, tensor: pb.Tensor, owner: torch.Tensor, saved_owner: pb.Tensor) -> _Cut | str | None:
        """Of state whose parameter is cut otherwise than it was."""
        shape = tuple(tensor.shape)
        if not tensor.HasField("subclass"):
            if shape == tuple(owner.shape) and shape:
                return _cut_of(owner, shape)
            if math.prod(shape) > 1 and math.prod(shape) == self._cut_numel(saved_owner):
                return "as large as the part of its parameter that the rank had, which is cut otherwise here"
            return None  # a step counter, a factor of its own: every rank has it whole
        if _box_of(self._layout, tensor) is None:
            return f"{tensor.subclass.type_name} of a parameter that is cut otherwise here"
        is_alike = list(tensor.distributed.placements) == list(saved_owner.distributed.placements)
        return _cut_of(owner, shape, is_whole=not is_alike)

    def _cut_numel(self, tensor: pb.Tensor) -> int:
        """The elements that the rank has of a DTensor; 0 of any other."""
        if not tensor.HasField("distributed"):
            return 0
        return math.prod(self._layout.tensors[tensor.subclass.components[0].tensor].shape)


def _cut_of(live: torch.Tensor, shape: tuple[int, ...], *, is_whole: bool = False) -> _Cut | None:
    """The box that this rank has of a tensor of that global shape, cut as `live` is. `is_whole`: on every rank."""
    if not isinstance(live, DTensor):
        return None if type(live) not in (torch.Tensor, torch.nn.Parameter) else _Cut(_whole(shape))
    placements = tuple(live.placements)
    if any(isinstance(placement, Partial) for placement in placements):
        return None
    if is_whole or any(getattr(placement, "dim", -1) >= len(shape) for placement in placements):
        placements = (Replicate(),) * len(placements)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(torch.Size(shape), live.device_mesh, placements)
    if 0 in local:  # its offset is of no account, and lies beyond the end
        offset = tuple(0 for _ in shape)
    box = Box(tuple(map(int, offset)), tuple(map(int, local)))
    return _Cut(box, live.device_mesh, placements)


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


# --- what was saved -----------------------------------------------------------------------------------
def _box_of(layout: pb.ShardLayout, tensor: pb.Tensor) -> tuple[Box, pb.Tensor] | None:
    """(box, the tensor that has its bytes) of an outer tensor; None: it is no box of a whole."""
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
    if cut.mesh is None:
        return tensor.HasField("distributed")
    if not tensor.HasField("distributed"):
        return not tensor.HasField("subclass")
    saved = tensor.distributed
    return (
        list(saved.mesh_shape) != list(cut.mesh.shape)
        or list(saved.placements) != [str(placement) for placement in cut.placements]
        or list(saved.mesh_coordinate) != list(cut.mesh.get_coordinate() or ())
    )


class _SavedBoxes:
    """Every saved box of every tensor, by name."""

    def __init__(self, base: int, layouts: Mapping[int, pb.ShardLayout]) -> None:
        self._layouts = layouts
        self._base = base
        self._numbers = {
            rank: {tensor.name: number for number, tensor in _outer(layout)}
            for rank, layout in layouts.items()
        }
        self._elsewhere: dict[int, Elsewhere] = {}

    def has(self, name: str) -> bool:
        layout, number = self._layouts[self._base], self._numbers[self._base].get(name)
        return number is not None and _box_of(layout, layout.tensors[number]) is not None

    def _boxes(self, name: str) -> Iterator[tuple[int, Box, pb.Tensor]]:
        """(rank, box, the tensor that has its bytes): the base's first, then by rank; but of plain tensors that nobody
        says are replicas, which may differ, all ranks take the same one.
        """
        first = self._layouts[self._base].tensors[self._numbers[self._base][name]]
        is_alike = first.HasField("distributed") or bool(first.replica_set.ranks)
        for rank in sorted(self._layouts, key=lambda rank: (is_alike and rank != self._base, rank)):
            layout, number = self._layouts[rank], self._numbers[rank].get(name)
            tensor = None if number is None else layout.tensors[number]
            saved = None if tensor is None else _box_of(layout, tensor)
            if tensor is None or saved is None:
                continue
            if (tensor.dtype, list(tensor.shape)) != (first.dtype, list(first.shape)):
                raise IntegrityError(
                    "two ranks of the snapshot have other tensors of one name", tensor=name, rank=rank
                )
            yield rank, *saved

    def parts(self, name: str, wanted: Box, itemsize: int) -> list[Part]:
        """What the wanted box is put together from: each byte once."""
        found: list[Part] = []
        used: set[Box] = set()
        count = 0
        for rank, box, tensor in self._boxes(name):
            if count >= wanted.size:
                break
            if box in used or 0 in box.shape:
                continue
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

    def _place(self, rank: int, tensor: pb.Tensor) -> tuple[int, int]:
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
    if cut.mesh is None:
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
    _describe(tensor.distributed, cut.mesh, cut.placements)
    layout.tensors.append(local)


def _give_bytes(tensor: pb.Tensor, region: int, shape: tuple[int, ...], itemsize: int, result: Recut) -> None:
    """Row-major, at the beginning of a region and of a storage of its own."""
    tensor.shape[:] = shape
    tensor.strides[:] = contiguous(shape)
    tensor.region, tensor.region_offset = region, 0
    tensor.nbytes = math.prod(shape) * itemsize
    tensor.storage_alias, tensor.storage_offset = result.next_alias, 0
    result.next_alias += 1


def _describe(message: pb.Distributed, mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    message.mesh_shape.extend(mesh.shape)
    message.mesh_dim_names.extend(mesh.mesh_dim_names or ())
    message.placements.extend(str(placement) for placement in placements)
    message.mesh_coordinate.extend(mesh.get_coordinate() or ())
    message.mesh_ranks.extend(mesh.mesh.flatten().tolist())
