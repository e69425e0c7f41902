"""Pieces: which bytes of which region go to which chunk."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from snapd_native import ZERO_FILL

from .regions import EARLY, FROZEN, Plan

ALIGN = 64


class PlanArrays(NamedTuple):
    """The arguments of `snapd_native.CopyPlan`."""

    src_index: array[int]
    src_offset: array[int]
    dst_index: array[int]
    dst_offset: array[int]
    nbytes: array[int]
    group: array[int]


def empty_plan() -> PlanArrays:
    return PlanArrays(array("I"), array("Q"), array("I"), array("Q"), array("Q"), array("B"))


class Range(NamedTuple):
    name: str
    shard_offset: int
    nbytes: int


class Pieces:
    """Offsets of all regions in the shard, the copies that fill its chunks, and how long each chunk is.

    `region_offset[r]` is a shard offset: chunk number times chunk_bytes, plus the offset in the chunk.
    """

    def __init__(self, plan: Plan, *, layout_chunks: int, values_capacity: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.early_values_offset = layout_chunks * chunk_bytes
        self.early, self.lazy = empty_plan(), empty_plan()
        self.chunk_nbytes = array("I", [chunk_bytes] * layout_chunks)
        self.region_offset: list[int] = []
        self.ranges: list[Range] = []
        self.unchanging_chunks: list[int] = []
        self._layout_chunks = layout_chunks
        name, at = EARLY, layout_chunks * chunk_bytes
        start, at = at, at + values_capacity
        for number, region in enumerate(plan.regions):
            if region.holder is not None:
                self.region_offset.append(0)
                continue
            if region.range_name != name:
                at = self._close(name, start, at)
                name, start = region.range_name, at
            into = self.early if region.is_early else self.lazy
            gap = -at % ALIGN
            if gap:
                at = self._add(into, ZERO_FILL, 0, at, gap, region.group)
            self.region_offset.append(at)
            at = self._add(into, number, 0, at, region.nbytes, region.group)
        self._close(name, start, at)

    def set_layout_nbytes(self, nbytes: int) -> None:
        """The layout's chunks are as long as it is; a chunk that it does not reach has one byte."""
        for chunk in range(self._layout_chunks):
            self.chunk_nbytes[chunk] = max(1, min(self.chunk_bytes, nbytes - chunk * self.chunk_bytes))

    def _add(self, plan: PlanArrays, region: int, offset: int, at: int, nbytes: int, group: int) -> int:
        """Cut at chunk borders; returns the shard offset after the last byte."""
        size = self.chunk_bytes
        while nbytes:
            chunk, start = divmod(at, size)
            count = min(nbytes, size - start)
            plan.src_index.append(region)
            plan.src_offset.append(offset)
            plan.dst_index.append(chunk)
            plan.dst_offset.append(start)
            plan.nbytes.append(count)
            plan.group.append(group)
            offset, at, nbytes = offset + count, at + count, nbytes - count
        return at

    def _close(self, name: str, start: int, end: int) -> int:
        """End a range; returns where the next one begins."""
        size = self.chunk_bytes
        first, last = start // size, -(-end // size)
        self.ranges.append(Range(name, start, end - start))
        for chunk in range(first, last):
            self.chunk_nbytes.append(min(size, end - chunk * size))
        if name == FROZEN:
            self.unchanging_chunks.extend(range(first, last))
        return last * size
