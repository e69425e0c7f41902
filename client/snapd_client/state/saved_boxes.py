"""What the ranks of a snapshot saved of each tensor, and which of them have what a box takes.

The layout of one rank names mesh and placements of every DTensor: from these follow the boxes of all ranks, so that
only the layouts of those that meet a wanted box are read. What these say themselves decides; where it is not what was
expected, all layouts are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from snapd_proto import format_pb2 as pb

from ..errors import IntegrityError
from .boxes import Box, Part, common_runs
from .layouts import Layouts
from .placing import Boxes, all_coordinates, box_at, boxes_of, is_read_otherwise
from .transfers import Elsewhere

BoxesKey = tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]


def outer(layout: pb.ShardLayout) -> Iterator[tuple[int, pb.Tensor]]:
    """Tensors that are no component of another."""
    inner = {part.tensor for tensor in layout.tensors for part in tensor.subclass.components}
    return (entry for entry in enumerate(layout.tensors) if entry[0] not in inner)


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def box_of(layout: pb.ShardLayout, tensor: pb.Tensor) -> tuple[Box, pb.Tensor] | None:
    """(box, the tensor that has its bytes) of an outer tensor; None: it is no box of a whole."""
    if not tensor.HasField("subclass"):
        return whole(tuple(tensor.shape)), tensor
    local = _local_of(layout, tensor)
    if local is None:
        return None
    saved = tensor.distributed
    if len(saved.mesh_coordinate) != len(saved.mesh_shape):  # a rank beside the mesh: it has nothing
        return Box((0,) * len(tensor.shape), (0,) * len(tensor.shape)), local
    box = box_at(tensor.shape, saved.mesh_shape, saved.placements, saved.mesh_coordinate)
    return None if box is None or box.shape != tuple(local.shape) else (box, local)


def _local_of(layout: pb.ShardLayout, tensor: pb.Tensor) -> pb.Tensor | None:
    """The plain tensor with a DTensor's part; None: it is none, or its parts are no plain ones of a whole."""
    if not tensor.HasField("distributed") or len(tensor.subclass.components) != 1:
        return None
    local = layout.tensors[tensor.subclass.components[0].tensor]
    is_partial = any(text.startswith("P") for text in tensor.distributed.placements)
    return None if is_partial or local.HasField("subclass") else local


class SavedBoxes:
    """Every saved box of every tensor, by name. `base`: the rank whose layout is at hand."""

    def __init__(self, base: int, layouts: Layouts) -> None:
        self._layouts = layouts
        self._base = base
        self._by_name: dict[int, dict[str, pb.Tensor]] = {}
        self._elsewhere: dict[int, Elsewhere] = {}
        self._boxes_of: dict[BoxesKey, Boxes | None] = {}

    def has(self, name: str) -> bool:
        tensor = self._tensor(self._base, name)
        return tensor is not None and box_of(self._layouts[self._base], tensor) is not None

    def problem(self, name: str) -> str:
        """Why a DTensor of plain parts cannot be put together; empty: it can, or it is none."""
        tensor = self._tensor(self._base, name)
        if tensor is None or not tensor.HasField("distributed"):
            return ""
        saved = tensor.distributed
        ranks: Collection[int] = [self._base]
        if is_read_otherwise(tensor.shape, saved.mesh_shape, saved.placements):
            ranks = [
                rank for rank in saved.mesh_ranks if rank in self._layouts
            ]  # who made it shows on all of them
            self._layouts.need(ranks)
        for rank in ranks:
            its = self._tensor(rank, name)
            local = _local_of(self._layouts[rank], its) if its is not None else None
            if its is not None and local is not None and box_of(self._layouts[rank], its) is None:
                return no_box(its.shape, saved.mesh_shape, saved.placements, local.shape)
        return ""

    def need(self, wanted: Iterable[tuple[str, Box]]) -> None:
        """Have the layouts read that these boxes (of tensors by name) take, all at once."""
        ranks: set[int] = {self._base}
        for name, box in wanted:
            ranks.update(self._holders(name, box) or ())
        self._layouts.need(ranks)

    def parts(self, name: str, wanted: Box, itemsize: int) -> list[Part]:
        """What the wanted box is put together from: each byte once.

        Raises:
            IntegrityError: the saved boxes do not cover it.
        """
        for ranks in (self._holders(name, wanted), self._layouts):
            if ranks is None:
                continue
            self._layouts.need(ranks)
            found = self._parts_of(name, wanted, itemsize, ranks)
            count = sum(part.runs.total_nbytes for part in found) // itemsize
            if count == wanted.size:
                return found
        raise IntegrityError(
            "the shards of the snapshot do not cover a tensor", tensor=name, found=count, wanted=wanted.size
        )

    def _parts_of(self, name: str, wanted: Box, itemsize: int, ranks: Collection[int]) -> list[Part]:
        found: list[Part] = []
        used: set[Box] = set()
        left = wanted.size
        for rank, box, tensor in self._boxes(name, ranks):
            if left <= 0:
                break
            if box in used or 0 in box.shape:
                continue
            used.add(box)
            runs = common_runs(box, tensor.strides, wanted, itemsize)
            if runs is not None:
                holder, first = self._place(rank, tensor)
                found.append(Part(holder, runs._replace(there=runs.there + first)))
                left -= runs.total_nbytes // itemsize
        return found

    def _boxes(self, name: str, ranks: Collection[int]) -> Iterator[tuple[int, Box, pb.Tensor]]:
        """(rank, box, the tensor that has its bytes): the base's first, then by rank; but of plain tensors that nobody
        says are replicas, which may differ, all ranks take the same one.
        """
        first = self._tensor(self._base, name)
        assert first is not None
        is_alike = _is_alike(first)
        for rank in sorted(ranks, key=lambda rank: (is_alike and rank != self._base, rank)):
            tensor = self._tensor(rank, name)
            saved = None if tensor is None else box_of(self._layouts[rank], tensor)
            if tensor is None or saved is None:
                continue
            if (tensor.dtype, list(tensor.shape)) != (first.dtype, list(first.shape)):
                raise IntegrityError(
                    "two ranks of the snapshot have other tensors of one name", tensor=name, rank=rank
                )
            yield rank, *saved

    # --- which ranks have it ------------------------------------------------------------------------------
    def _holders(self, name: str, wanted: Box) -> list[int] | None:
        """Ranks that have the wanted box together, as the base's layout says; None: it does not say."""
        tensor = self._tensor(self._base, name)
        if tensor is None or 0 in wanted.shape:
            return [self._base]
        if not tensor.HasField("distributed"):
            return [self._base] if _is_alike(tensor) else [min(self._layouts)]
        saved = tensor.distributed
        boxes = self._all_boxes(tensor)
        if boxes is None or len(saved.mesh_ranks) != len(boxes.offsets):
            return None
        by_box: dict[Box, int] = {}
        for number in boxes.meeting(wanted):
            rank, box = saved.mesh_ranks[number], boxes.box(number)
            if rank == self._base or rank < by_box.get(box, len(self._layouts)) != self._base:
                by_box[box] = rank
        ranks = list(by_box.values())
        return ranks if all(rank in self._layouts for rank in ranks) else None

    def _all_boxes(self, tensor: pb.Tensor) -> Boxes | None:
        """Of all ranks of its mesh; most tensors are cut as others are."""
        saved = tensor.distributed
        key = (tuple(tensor.shape), tuple(saved.mesh_shape), tuple(saved.placements))
        if key not in self._boxes_of:
            self._boxes_of[key] = boxes_of(*key, all_coordinates(saved.mesh_shape))
        return self._boxes_of[key]

    def _tensor(self, rank: int, name: str) -> pb.Tensor | None:
        known = self._by_name.get(rank)
        if known is None:
            known = self._by_name[rank] = {tensor.name: tensor for _, tensor in outer(self._layouts[rank])}
        return known.get(name)

    def _place(self, rank: int, tensor: pb.Tensor) -> tuple[int, int]:
        """(rank whose shard has the bytes, shard offset of the tensor's first element)."""
        layout = self._layouts[rank]
        region = layout.regions[tensor.region]
        holder, offset = rank, region.shard_offset
        if region.held_by_rank_plus_one:
            elsewhere = self._elsewhere.get(rank)
            if elsewhere is None:
                self._layouts.need({one.held_by_rank_plus_one - 1 for one in layout.regions} - {-1})
                elsewhere = self._elsewhere[rank] = Elsewhere(layout, self._layouts)
            holder, offset = elsewhere.shard_offset(tensor.region, region)
        return holder, offset + tensor.region_offset


def no_box(
    shape: Iterable[int], mesh: Iterable[int], placements: Iterable[object], local: Iterable[int]
) -> str:
    """Words for a tensor whose parts are no boxes of the whole."""
    return (
        f"{'x'.join(map(str, shape))} as [{', '.join(map(str, placements))}] on a mesh of"
        f" {'x'.join(map(str, mesh))}, a rank having {'x'.join(map(str, local))}: such parts cannot be cut otherwise;"
        " restore on the same mesh, or give the dimension a size that the mesh divides"
    )


def _is_alike(tensor: pb.Tensor) -> bool:
    """Whether any rank that has a part has it as the others do."""
    return tensor.HasField("distributed") or bool(tensor.replica_set.ranks)
