"""From the chunks of a snapshot to memory: which bytes of which chunk go where, and whether a layout makes sense.

Chunks are numbered over all shards that are read: first this rank's own, in order, then those of other ranks of the
node that keep bytes for it (`replicas`).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import NamedTuple

from snapd_proto import format_pb2 as pb

from ..errors import IntegrityError
from .pieces import PlanArrays, empty_plan
from .tensors import dtypes, span_nbytes

TENSOR_DIMS_MAX = 64


class RestorePlan(NamedTuple):
    """`sources[i]`: (rank, chunk of its shard) of source i; `pieces_of_source[i]`: its first piece and their count."""

    arrays: PlanArrays
    destinations: array[int]
    sources: list[tuple[int, int]]
    pieces_of_source: list[tuple[int, int]]


class Elsewhere:
    """Regions whose bytes lie in other ranks' shards.

    Raises:
        IntegrityError: a layout that is needed is not there, or describes the tensor otherwise.
    """

    def __init__(self, layout: pb.ShardLayout, others: Mapping[int, pb.ShardLayout]) -> None:
        self._others = others
        self._first: dict[int, pb.Tensor] = {}  # region -> a tensor in it
        for tensor in layout.tensors:
            if not tensor.HasField("subclass"):
                self._first.setdefault(tensor.region, tensor)
        wanted = {region.held_by_rank_plus_one - 1 for region in layout.regions} - {-1}
        for rank in wanted:
            if rank not in others:
                raise IntegrityError("bytes of this shard lie in another one, which was not given", rank=rank)
            check_bounds(others[rank])
        self._tensors = {
            rank: {tensor.name: tensor for tensor in others[rank].tensors if not tensor.HasField("subclass")}
            for rank in wanted
        }

    def shard_offset(self, number: int, region: pb.Region) -> tuple[int, int]:
        """(rank, offset in its shard) of the region's first byte."""
        rank, mine = region.held_by_rank_plus_one - 1, self._first[number]
        theirs = self._tensors[rank].get(mine.name)
        if theirs is None or (theirs.dtype, list(theirs.shape)) != (mine.dtype, list(mine.shape)):
            raise IntegrityError(
                "the shard that should keep a tensor does not have it", tensor=mine.name, rank=rank
            )
        there = self._others[rank].regions[theirs.region]
        inner = theirs.region_offset - mine.region_offset
        if there.held_by_rank_plus_one or inner < 0 or inner + region.nbytes > there.nbytes:
            raise IntegrityError(
                "the shard that should keep a tensor has it otherwise", tensor=mine.name, rank=rank
            )
        return rank, there.shard_offset + inner

    def layout_of(self, rank: int) -> pb.ShardLayout:
        return self._others[rank]


def chunk_count(layout: pb.ShardLayout) -> int:
    size = layout.chunk_bytes
    return max((-(-(entry.shard_offset + entry.nbytes) // size) for entry in layout.ranges), default=0)


def plan_copies(layout: pb.ShardLayout, bases: Mapping[int, int], elsewhere: Elsewhere) -> RestorePlan:
    """The copies that fill the regions in `bases` (region -> address), sorted by source."""
    spans: dict[int, list[tuple[int, int, int]]] = {
        layout.rank: []
    }  # rank -> (shard offset, nbytes, address)
    for number, address in bases.items():
        region = layout.regions[number]
        rank, offset = layout.rank, region.shard_offset
        if region.held_by_rank_plus_one:
            rank, offset = elsewhere.shard_offset(number, region)
        spans.setdefault(rank, []).append((offset, region.nbytes, address))
    plan, destinations = empty_plan(), array("Q")
    sources: list[tuple[int, int]] = []
    pieces: list[list[int]] = []
    for rank, found in spans.items():
        shard = layout if rank == layout.rank else elsewhere.layout_of(rank)
        size, first = shard.chunk_bytes, len(sources)
        sources.extend((rank, chunk) for chunk in range(chunk_count(shard)))
        pieces.extend([0, 0] for _ in range(chunk_count(shard)))
        for at, nbytes, address in sorted(found):
            destinations.append(address)
            offset = 0
            while offset < nbytes:
                chunk, start = divmod(at + offset, size)
                count = min(nbytes - offset, size - start)
                counter = pieces[first + chunk]
                if counter[1] == 0:
                    counter[0] = len(plan.nbytes)
                counter[1] += 1
                row = (first + chunk, start, len(destinations) - 1, offset, count, 0)
                for column, value in zip(plan, row, strict=True):
                    column.append(value)
                offset += count
    return RestorePlan(plan, destinations, sources, [(first, count) for first, count in pieces])


def check_bounds(layout: pb.ShardLayout) -> None:
    """Refuse a layout whose numbers do not fit together, before anything is allocated or addressed.

    Raises:
        IntegrityError: names the tensor.
    """
    end = max((r.shard_offset + r.nbytes for r in layout.ranges), default=0)
    if not layout.chunk_bytes or layout.chunk_bytes % 64:
        raise IntegrityError("the layout's chunk size is impossible", chunk_bytes=layout.chunk_bytes)
    for region in layout.regions:
        if region.held_by_rank_plus_one:
            continue  # its bytes are in another shard, whose layout is checked like this one
        if region.shard_offset + region.nbytes > end:
            raise IntegrityError("a region lies beyond the shard's end", offset=region.shard_offset)
    for number, tensor in enumerate(layout.tensors):
        is_wrapper = tensor.HasField("subclass")
        if any(
            part.tensor <= number or part.tensor >= len(layout.tensors) for part in tensor.subclass.components
        ):
            raise IntegrityError("a tensor's components do not follow it", tensor=tensor.name)
        if tensor.dtype not in dtypes or len(tensor.shape) > TENSOR_DIMS_MAX:
            raise IntegrityError(
                "a tensor's dtype or shape is unknown here", tensor=tensor.name, dtype=tensor.dtype
            )
        if is_wrapper:
            continue
        if (
            len(tensor.strides) != len(tensor.shape)
            or len(tensor.live_strides) not in (0, len(tensor.shape))
            or tensor.region >= len(layout.regions)
        ):
            raise IntegrityError("a tensor's description is inconsistent", tensor=tensor.name)
        itemsize = dtypes[tensor.dtype].itemsize
        span = span_nbytes(tuple(tensor.shape), tuple(tensor.strides), itemsize)
        fits = tensor.region_offset + span <= layout.regions[tensor.region].nbytes and span <= tensor.nbytes
        if (
            not fits
            or min((*tensor.strides, *tensor.live_strides), default=0) < 0
            or tensor.storage_offset % itemsize
        ):
            raise IntegrityError("a tensor does not fit its region", tensor=tensor.name, nbytes=span)
