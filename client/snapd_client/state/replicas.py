"""Bytes that several ranks of one node hold alike: which they are, and which rank's shard keeps them.

Parameters of modules wrapped in DistributedDataParallel, DTensors that are replicated over some mesh dimension, and the
optimizer state of both. Never buffers, generators or gradients: those may differ. The choice depends on names and sizes
only, which are the same on all ranks, so no rank has to be asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .records import ParameterRecord, Role, TensorRecord

SHARED_BYTES_MIN = 4096  # smaller ones are kept by every rank: a search for them costs more than they do

_SHARED_ROLES = (Role.PARAMETER, Role.OPTIMIZER)


class Replicas:
    """Which ranks hold the same bytes, tensor by tensor."""

    def __init__(self, parameters: Iterable[ParameterRecord]) -> None:
        self._ranks_of = {record.name: record.replica_ranks for record in parameters if record.replica_ranks}

    def ranks(self, record: TensorRecord) -> tuple[int, ...]:
        """All ranks with these bytes, this one included; empty if nobody else has them."""
        if record.place.role not in _SHARED_ROLES or not record.place.owner:
            return ()
        spec = record.around if record.spec is None else record.spec
        if spec is not None:
            return mesh_replicas(spec)
        return self._ranks_of.get(record.place.owner, ())


def mesh_replicas(spec: Any) -> tuple[int, ...]:
    """Ranks that differ from this one in replicated mesh dimensions only; empty if there is no such dimension."""
    mesh = spec.mesh
    dims = [
        dim
        for dim, placement in enumerate(spec.placements)
        if placement.is_replicate() and mesh.shape[dim] > 1
    ]
    coordinate = mesh.get_coordinate()
    if coordinate is None or not dims:
        return ()
    index = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    return tuple(sorted(mesh.mesh[index].flatten().tolist()))


def share_out(
    sizes: Mapping[str, int], ranks_of: Mapping[str, Sequence[int]], node_ranks: Sequence[int]
) -> dict[str, int]:
    """Name -> the rank whose shard keeps the bytes, for every name that several ranks of the node hold.

    The largest first, each to the rank with the least so far among those that hold it: their loads differ by one
    tensor at most. Each set of ranks is shared out by itself: two ranks see the same names of the sets that both are
    in, and other names of the others (tensor parallelism beside data parallelism), which must play no part. Pure.
    """
    on_node = set(node_ranks)
    load: dict[tuple[tuple[int, ...], int], int] = defaultdict(int)
    holders: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        candidates = tuple(sorted(on_node.intersection(ranks_of.get(name, ()))))
        if len(candidates) > 1 and sizes[name] >= SHARED_BYTES_MIN:
            holder = min(candidates, key=lambda rank: (load[candidates, rank], rank))
            holders[name] = holder
            load[candidates, holder] += sizes[name]
    return holders
