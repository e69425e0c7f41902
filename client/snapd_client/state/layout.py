"""Which byte of the state lies where in the shard. Computed once, reused while the structure stays.

The shard is a sequence of chunks. Ranges begin on chunks of their own: the layout itself; the early range
(the values, then the early tensors); the frozen parameters; the parameters; each optimizer field; the rest.
Inside a range tensors begin at multiples of 64 bytes, and the gaps are filled with zeroes, so that equal
state gives equal chunks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter

import torch

from ..errors import CaptureError
from .pieces import Pieces, PlanArrays
from .regions import Plan, plan_regions
from .serialize import serialize_layout
from .tree import StateTree, Walk

__all__ = ["Binding", "Layout", "PlanArrays", "build_layout"]

_data_ptr = torch.Tensor.data_ptr
_storage = torch.Tensor.untyped_storage
_version = attrgetter("_version")
_VALUES_SPARE = 4096
_ALIGN = 64


class Binding:
    """Where the regions lie now, and the version counters at this moment."""

    __slots__ = ("bases", "layout", "pointers", "storages", "versions")

    def __init__(
        self,
        layout: Layout,
        bases: array[int],
        versions: list[int | None],
        pointers: list[int],
        storages: list[torch.UntypedStorage],
    ) -> None:
        self.layout, self.bases, self.versions, self.pointers = layout, bases, versions, pointers
        self.storages = storages  # held: `p.data = other` must not free what is being copied

    def changed_since(self, walk: Walk, groups: set[int]) -> list[str]:
        """Names of lazily taken tensors of these fence groups that were written or moved since then."""
        now = _versions(walk.outers)
        pointers = list(map(_data_ptr, walk.buffers))
        layout = self.layout
        reshaped = walk.find_reshaped()
        if not reshaped and now == self.versions and pointers == self.pointers:
            return []
        names = []
        for buffer, name in enumerate(walk.names):
            region = layout.region_of[buffer]
            if (
                layout.is_early[region]
                or layout.is_elsewhere[region]
                or layout.region_group[region] not in groups
            ):
                continue
            is_moved = pointers[buffer] != self.pointers[buffer] or buffer in reshaped
            if is_moved or now[buffer] != self.versions[buffer]:
                names.append(name)
        return names


class Layout:
    """See the module. Regions are numbered as in the serialized layout; chunks count from the start of the
    shard.
    """

    def __init__(
        self, plan: Plan, pieces: Pieces, serialized: bytes, walk: Walk, values_at: int, capacity: int
    ) -> None:
        self.serialized = serialized
        self.chunk_nbytes = pieces.chunk_nbytes
        self.early_values_offset, self.early_values_capacity = values_at, capacity
        self.state_nbytes = sum(region.nbytes for region in plan.regions if region.holder is None)
        self.lazy, self.early = pieces.lazy, pieces.early
        self.region_names = [region.name for region in plan.regions]
        self.region_group = array("B", [region.group for region in plan.regions])
        self.is_early = [region.is_early for region in plan.regions]
        self.is_elsewhere = [region.holder is not None for region in plan.regions]
        self.unchanging_regions = [
            number for number, region in enumerate(plan.regions) if region.is_frozen and region.holder is None
        ]
        self.unchanging_chunks = pieces.unchanging_chunks
        self.region_of = plan.region_of
        self._first = [region.buffers[0][0] for region in plan.regions]
        self._held_pointers: list[int] = []
        self._storages: list[torch.UntypedStorage] = []
        self._shared = [(r, region.buffers) for r, region in enumerate(plan.regions)
                        if len(region.buffers) > 1 or region.buffers[0][1]]  # fmt: skip

    def bind(self, walk: Walk) -> Binding | None:
        """Take addresses and counters; None if the aliasing is not that of this layout.

        `walk` must have the signature of the walk that the layout was made from: then shapes are the same.
        """
        pointers = walk.pointers
        bases = array("Q", map(pointers.__getitem__, self._first))
        for region, buffers in self._shared:
            base = pointers[buffers[0][0]] - buffers[0][1]
            if any(pointers[buffer] - offset != base for buffer, offset in buffers):
                return None
            bases[region] = base
        if pointers != self._held_pointers:  # while a storage is held, nothing else can lie at its address
            self._held_pointers = pointers
            self._storages = list(map(_storage, walk.buffers))
        return Binding(self, bases, _versions(walk.outers), pointers, self._storages)


def _versions(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # inference tensors have no counter
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def build_layout(tree: StateTree, walk: Walk, *, chunk_bytes: int, node_ranks: Sequence[int] = ()) -> Layout:
    """A layout for this walk.

    Args:
        node_ranks: ranks of this node, this one included, that share out the bytes which they hold alike (DDP, HSDP);
            each shard then has a part of them, and `prepare_restore` needs the layouts of the others. All these ranks
            must pass the same. Empty: the shard is complete.
    Raises:
        CaptureError: `chunk_bytes` is no positive multiple of 64.
    """
    if chunk_bytes < _ALIGN or chunk_bytes % _ALIGN:
        raise CaptureError("the chunk size is no positive multiple of 64", chunk_bytes=chunk_bytes)
    plan = plan_regions(walk, tree.forced_early, rank=tree.rank, node_ranks=node_ranks)
    values_nbytes = len(walk.encode_early(2**63, 2**63))
    capacity = -(-(values_nbytes + values_nbytes // 4 + _VALUES_SPARE) // _ALIGN) * _ALIGN
    layout_chunks = 1
    while True:
        pieces = Pieces(plan, layout_chunks=layout_chunks, values_capacity=capacity, chunk_bytes=chunk_bytes)
        serialized = serialize_layout(tree, walk, plan, pieces, capacity)
        needed = -(-len(serialized) // chunk_bytes)
        if needed <= layout_chunks:
            pieces.set_layout_nbytes(len(serialized))
            return Layout(plan, pieces, serialized, walk, layout_chunks * chunk_bytes, capacity)
        layout_chunks = needed
