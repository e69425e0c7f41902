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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from snapd_proto import format_pb2 as pb
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from .boxes import Box, Part, contiguous
from .classes import type_name
from .layouts import Layouts
from .names import Names, entries
from .placing import box_at
from .saved_boxes import SavedBoxes, box_of, no_box, outer, whole
from .tensors import LOCAL, dtypes
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
    """How a tensor is cut here. `mesh`: None: a plain tensor. `problem`: why its parts are no boxes; else empty."""

    box: Box
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    problem: str = ""


def needs_recut(layout: pb.ShardLayout, state: Mapping[str, object], names: Names) -> bool:
    """Whether a tensor of the layout has a live counterpart with another box, or one whose wrapper differs."""
    if renames_for(layout, state, names):
        return True
    cuts = _Cuts(layout, _live_tensors(state, names))
    found = ((number, cuts.of(tensor)) for number, tensor in outer(layout))
    return any(isinstance(cut, str) or (cut and _differs(layout, number, cut)) for number, cut in found)


def recut(
    base: pb.ShardLayout,
    layouts: Layouts,
    state: Mapping[str, object],
    names: Names,
) -> Recut:
    """Cut `base`, the layout of one saved rank, as the live state is cut.

    Args:
        layouts: of all saved ranks, `base` among them; only those that are needed are read.
    Raises:
        IntegrityError: the saved boxes of a tensor do not cover it: shards are missing, or do not belong together.
    """
    made = pb.ShardLayout()
    made.CopyFrom(base)
    result = Recut(made, next_alias=1 + max((tensor.storage_alias for tensor in made.tensors), default=0))
    cuts = _Cuts(base, _live_tensors(state, names))
    saved = SavedBoxes(base.rank, layouts)
    anew: dict[int, _Cut] = {}
    for number, tensor in outer(base):
        cut = cuts.of(tensor)
        if isinstance(cut, str):
            result.refused.append((tensor.name, cut))
        elif cut is not None and _differs(base, number, cut):
            why = cut.problem or saved.problem(tensor.name)
            if why:
                result.refused.append((tensor.name, why))
            elif saved.has(tensor.name):
                anew[number] = cut
    saved.need((base.tensors[number].name, cut.box) for number, cut in anew.items())
    for number, cut in anew.items():
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


class _Cuts:
    """How the tensors of a layout have to be cut here."""

    def __init__(self, layout: pb.ShardLayout, lives: Mapping[str, torch.Tensor]) -> None:
        self._layout, self._lives = layout, lives
        self._parameters = {
            tensor.parameter_name: number for number, tensor in outer(layout) if tensor.is_parameter
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
        if box_of(self._layout, tensor) is None:
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
        return None if type(live) not in (torch.Tensor, torch.nn.Parameter) else _Cut(whole(shape))
    placements = tuple(live.placements)
    if any(isinstance(placement, Partial) for placement in placements):
        return None
    if live.device_mesh.get_coordinate() is None:  # another rank's
        return None
    if is_whole or any(getattr(placement, "dim", -1) >= len(shape) for placement in placements):
        placements = (Replicate(),) * len(placements)
    mesh, texts = live.device_mesh, list(map(str, placements))
    box = box_at(shape, mesh.shape, texts, mesh.get_coordinate() or ())
    local = tuple(live._local_tensor.shape)
    if box is None or (tuple(live.shape) == shape and not is_whole and box.shape != local):
        return _Cut(whole(shape), mesh, placements, no_box(shape, mesh.shape, texts, local))
    return _Cut(box, mesh, placements)


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


# --- the new cut --------------------------------------------------------------------------------------
def _cut_anew(result: Recut, number: int, cut: _Cut, saved: SavedBoxes) -> None:
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
