"""Boxes of a tensor: which part of the whole each shard holds, and the runs of bytes that two of them have in common.

A box is an offset and a shape in the global tensor. Where the shards of a snapshot were cut otherwise than this run
cuts them, each wanted box is put together from the saved boxes that it meets: only those ranges are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Offsets = npt.NDArray[np.uint64]


class Box(NamedTuple):
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Runs(NamedTuple):
    """Equally long runs: byte offsets from the first element of either box's tensor."""

    there: Offsets
    here: Offsets
    nbytes: int

    @property
    def total_nbytes(self) -> int:
        return len(self.there) * self.nbytes


class Part(NamedTuple):
    """Runs of bytes of one saved shard, `there` by shard offset, and where they go in a region that is put together."""

    rank: int
    runs: Runs


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides: list[int] = []
    step = 1
    for count in reversed(shape):
        strides.append(step)
        step *= max(1, count)
    return tuple(reversed(strides))


def common_runs(saved: Box, strides: Sequence[int], wanted: Box, itemsize: int) -> Runs | None:
    """The bytes that both boxes have, as the longest runs that lie in one piece on either side; None: nothing.

    Args:
        strides: of the saved tensor, in elements. The wanted one is row-major.
    """
    low = [max(one, other) for one, other in zip(saved.offset, wanted.offset, strict=True)]
    extent = [
        min(a + n, b + m) - start
        for a, n, b, m, start in zip(saved.offset, saved.shape, wanted.offset, wanted.shape, low, strict=True)
    ]
    if any(count <= 0 for count in extent):
        return None
    here_strides = contiguous(wanted.shape)
    run, inner = 1, len(extent)
    while inner and (extent[inner - 1] == 1 or strides[inner - 1] == here_strides[inner - 1] == run):
        inner -= 1
        run *= extent[inner]
    there = _offsets(low, saved.offset, extent, strides, inner) * np.uint64(itemsize)
    here = _offsets(low, wanted.offset, extent, here_strides, inner) * np.uint64(itemsize)
    return Runs(there, here, run * itemsize)


def _offsets(
    low: Sequence[int], offset: Sequence[int], extent: Sequence[int], strides: Sequence[int], outer: int
) -> Offsets:
    """Elements from the box's first one to each run's: every combination of the outer indices, in order."""
    start = sum((a - b) * stride for a, b, stride in zip(low, offset, strides, strict=True))
    found = np.array([start], dtype=np.uint64)
    for count, stride in zip(extent[:outer], strides[:outer], strict=True):
        steps = np.arange(count, dtype=np.uint64) * np.uint64(stride)
        found = np.add.outer(found, steps).reshape(-1)
    return found
