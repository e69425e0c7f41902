"""Regions of a layout that lie on a device: which they are, and their pieces for the side stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .lanes import Placement
from .session import Session
from .stage import DevicePiece, DeviceSample, DeviceStage, DeviceTransfer, flat_bytes
from .state.layout import Layout, PlanArrays
from .state.tree import Walk


class DeviceRegions:
    """The device's part of one layout. Without a device region it costs one empty set."""

    def __init__(self, layout: Layout, walk: Walk) -> None:
        first: dict[int, int] = {}
        for buffer, region in enumerate(layout.region_of):
            if walk.buffers[buffer].device.type != "cpu":
                first.setdefault(region, buffer)
        self.numbers = frozenset(first)
        self._first = first

    def pieces(
        self, arrays: PlanArrays, chunks: set[int] | None, *, walk: Walk, pointers: Sequence[int],
        bases: Sequence[int], placement: Placement, session: Session, is_early: bool,
    ) -> list[DevicePiece]:  # fmt: skip
        """The pieces of device regions that go to `chunks` (None: all)."""
        found = []
        size = session.chunk_bytes
        for src, src_offset, chunk, offset, nbytes, group in zip(*arrays, strict=True):
            if src not in self.numbers or (chunks is not None and chunk not in chunks):
                continue
            buffer = self._first[src]
            shift = pointers[buffer] - bases[src]  # where the buffer begins in its region
            source = flat_bytes(walk.buffers[buffer], src_offset - shift, nbytes)
            view = session.segments[placement.segments[chunk]].view(
                placement.frames[chunk] * size + offset, nbytes
            )
            found.append(DevicePiece(source, torch.frombuffer(view, dtype=torch.uint8), group, is_early))
        return found


class DeviceCapture:
    """The device's half of one capture."""

    def __init__(
        self, stage: DeviceStage, pieces: list[DevicePiece], regions: list[int], turn: int | None
    ) -> None:
        self.sample: DeviceSample | None = stage.sample(pieces, turn) if turn is not None else None
        self.transfer: DeviceTransfer = stage.submit(pieces)
        self._regions = regions

    def differing(self) -> list[int]:
        """Regions whose sampled bytes are not those of the copy."""
        return (
            [] if self.sample is None else sorted({self._regions[index] for index in self.sample.differing()})
        )
