"""The compiled copy plans of one layout, by the choice of chunks that are copied.

A layout is copied whole at first, later without its unchanging chunks but for those whose turn it is to be
rechecked: few choices, each compiled once.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from snapd_native import ZERO_FILL, CopyPlan

from .device import DevicePlan
from .lanes import Marks
from .state.layout import Binding, Layout, PlanArrays
from .state.tree import Walk


@dataclass(frozen=True)
class Choice:
    """Plans for the host's regions, and the chunks that they fill (None: all)."""

    lazy: CopyPlan
    early: CopyPlan
    chunks: frozenset[int] | None


class LayoutPlans:
    """Plans of one layout."""

    def __init__(self, layout: Layout, walk: Walk, chunk_bytes: int) -> None:
        self.layout = layout
        self.device = DevicePlan(layout, walk, chunk_bytes)
        unchanging = set(layout.unchanging_regions)
        self._unchanging = [b for b, region in enumerate(layout.region_of) if region in unchanging]
        self._choices: dict[frozenset[int] | None, Choice] = {}

    def marks(self, binding: Binding) -> Marks:
        """What the tensors that should not change are like now."""
        pointers, versions = binding.pointers, binding.versions
        return [(pointers[buffer], versions[buffer]) for buffer in self._unchanging]

    def choose(self, fresh: list[int] | None) -> Choice:
        """Plans for these chunks; None: all of the shard."""
        key = None if fresh is None else frozenset(fresh)
        choice = self._choices.get(key)
        if choice is None:
            layout, without = self.layout, self.device.regions
            choice = Choice(_compile(layout.lazy, key, without), _compile(layout.early, key, without), key)
            self._choices[key] = choice
        return choice


def _compile(arrays: PlanArrays, chunks: frozenset[int] | None, without: frozenset[int]) -> CopyPlan:
    if chunks is None and not without:
        return CopyPlan(*arrays)
    chosen = [
        index
        for index, (source, chunk) in enumerate(zip(arrays.src_index, arrays.dst_index, strict=True))
        if (chunks is None or chunk in chunks) and (source == ZERO_FILL or source not in without)
    ]
    return CopyPlan(*(array(column.typecode, [column[index] for index in chosen]) for column in arrays))
