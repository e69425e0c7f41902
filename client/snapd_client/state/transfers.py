"""From the chunks of a snapshot to memory: which bytes of which chunk go where, and whether a layout makes sense.

Chunks are numbered over all shards that are read: first this rank's own, in order, then those of other ranks of the
node that keep bytes for it (`replicas`).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from snapd_proto import format_pb2 as pb

from ..errors import IntegrityError
from .boxes import Offsets, Part
from .pieces import PlanArrays, empty_plan
from .tensors import dtypes, span_nbytes

TENSOR_DIMS_MAX = 64
Columns = tuple[Offsets, Offsets, Offsets, Offsets]


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
        for rank in sorted(wanted):
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


@dataclass(slots=True)
class _Spans:
    """Runs of bytes of one shard and where they go: columns of (shard offset, nbytes, destination, offset there)."""

    rows: list[Columns] = field(default_factory=list)
    single: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, there: Offsets, nbytes: int, destination: int, here: Offsets) -> None:
        count = len(there)
        sizes = np.full(count, nbytes, dtype=np.uint64)
        self.rows.append((there, sizes, np.full(count, destination, dtype=np.uint64), here))

    def pieces(self, chunk_bytes: int) -> tuple[Offsets, ...]:
        """Cut at chunk borders and sorted: (chunk, start in it, destination, offset there, nbytes)."""
        lone = np.array(self.single, dtype=np.uint64).reshape(-1, 4)
        rows = [(lone[:, 0], lone[:, 1], lone[:, 2], lone[:, 3]), *self.rows]
        at, nbytes, destination, here = (np.concatenate(column) for column in zip(*rows, strict=True))
        size = np.uint64(chunk_bytes)
        first = at // size
        counts = ((at + nbytes - np.uint64(1)) // size - first + np.uint64(1)).astype(np.int64)
        index = np.repeat(np.arange(len(at)), counts)
        nth = (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64)
        chunk = first[index] + nth
        begin = np.maximum(at[index], chunk * size)
        end = np.minimum((at + nbytes)[index], (chunk + np.uint64(1)) * size)
        order = np.lexsort((begin, chunk))
        columns = (
            chunk,
            begin - chunk * size,
            destination[index],
            here[index] + begin - at[index],
            end - begin,
        )
        return tuple(column[order] for column in columns)


def plan_copies(
    layout: pb.ShardLayout,
    bases: Mapping[int, int],
    elsewhere: Elsewhere,
    fills: Mapping[int, Sequence[Part]] | None = None,
) -> RestorePlan:
    """The copies that fill the regions in `bases` (region -> address), sorted by source.

    `fills`: regions that are put together from runs of any shard, instead of lying somewhere in one piece.
    """
    spans: dict[int, _Spans] = {layout.rank: _Spans()}
    destinations = array("Q")
    for number, address in bases.items():
        region = layout.regions[number]
        if fills and number in fills:
            for part in fills[number]:
                spans.setdefault(part.rank, _Spans()).add(
                    part.runs.there, part.runs.nbytes, len(destinations), part.runs.here
                )
        elif region.nbytes:
            rank, offset = layout.rank, region.shard_offset
            if region.held_by_rank_plus_one:
                rank, offset = elsewhere.shard_offset(number, region)
            spans.setdefault(rank, _Spans()).single.append((offset, region.nbytes, len(destinations), 0))
        destinations.append(address)
    plan = empty_plan()
    sources: list[tuple[int, int]] = []
    pieces_of_source: list[tuple[int, int]] = []
    for rank, found in spans.items():
        shard = layout if rank == layout.rank else elsewhere.layout_of(rank)
        count = chunk_count(shard)
        counts = np.zeros(count, dtype=np.int64)
        if found.rows or found.single:
            chunk, start, destination, here, nbytes = found.pieces(shard.chunk_bytes)
            if len(chunk) and int(chunk[-1]) >= count:
                raise IntegrityError("a region lies beyond the shard's end", rank=rank, chunk=int(chunk[-1]))
            counts = np.bincount(chunk.astype(np.int64), minlength=count)
            columns = (
                chunk + np.uint64(len(sources)),
                start,
                destination,
                here,
                nbytes,
                np.zeros_like(chunk),
            )
            before = len(plan.nbytes)
            for column, values in zip(plan, columns, strict=True):
                column.frombytes(values.astype(column.typecode).tobytes())
        else:
            before = len(plan.nbytes)
        firsts = before + np.cumsum(counts) - counts
        sources.extend((rank, number) for number in range(count))
        pieces_of_source.extend(zip(firsts.tolist(), counts.tolist(), strict=True))
    return RestorePlan(plan, destinations, sources, pieces_of_source)


def check_bounds(layout: pb.ShardLayout, filled: Collection[int] = ()) -> None:
    """Refuse a layout whose numbers do not fit together, before anything is allocated or addressed.

    `filled`: regions that do not lie in the shard, but are put together from others.

    Raises:
        IntegrityError: names the tensor.
    """
    end = max((r.shard_offset + r.nbytes for r in layout.ranges), default=0)
    if not layout.chunk_bytes or layout.chunk_bytes % 64:
        raise IntegrityError("the layout's chunk size is impossible", chunk_bytes=layout.chunk_bytes)
    for index, region in enumerate(layout.regions):
        if region.held_by_rank_plus_one or index in filled:
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
