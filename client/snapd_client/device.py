"""Regions of a layout that lie on a device: what of them goes where, and the samples of what may not change.

A `DevicePlan` belongs to one layout. What depends on addresses is made anew when they change, what depends on the
lane's frames at each capture. Small tensors are brought together on the device first, in the order of the shard: one
copy for many, where each alone would cost as much as a quarter of a megabyte.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import snapd_native as native
import torch

from .errors import CaptureError
from .lanes import Placement
from .stage import Copy, DeviceApi, DeviceStage, DeviceTransfer, DeviceWork, Gather, flat_bytes
from .state.layout import Binding, Layout
from .state.tree import Walk

SMALL_BYTES = 64 << 10  # a lazy piece up to this size is gathered
BLOCK_BYTES_MAX = 4 << 20
STAGED_BYTES_MAX = 64 << 20  # an early part above this has no memory of its own between captures
WINDOW_BYTES = 4096
SAMPLED_SHARE = 400  # at most one byte in so many is sampled
WINDOWS_STAY = 16  # captures until the windows move on, if each part has one; else they move at each capture
SAMPLE_GROUP = 255  # after all others
_ALIGN = 64


class Part(NamedTuple):
    """Bytes of one region that lie together in the shard: `offset` in the region, `position` in the shard."""

    region: int
    offset: int
    position: int
    nbytes: int
    group: int


class Block(NamedTuple):
    """Bytes of the gathered memory that lie together in the shard."""

    staged: int
    position: int
    nbytes: int
    group: int


@dataclass
class Staging:
    """Parts that are gathered, where each goes in the gathered memory, and the blocks that leave from there."""

    parts: list[Part] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    nbytes: int = 0

    def add(self, part: Part) -> None:
        """Parts come in the order of the shard. What lies between two of one block is alignment, and zero."""
        last = self.blocks[-1] if self.blocks else None
        if last is not None:
            gap = part.position - last.position - last.nbytes
            grown = last.nbytes + gap + part.nbytes
            if 0 <= gap < _ALIGN and part.group == last.group and grown <= BLOCK_BYTES_MAX:
                self._put(part, last.staged + last.nbytes + gap)
                self.blocks[-1] = last._replace(nbytes=grown)
                return
        start = -(-self.nbytes // _ALIGN) * _ALIGN
        self._put(part, start)
        self.blocks.append(Block(start, part.position, part.nbytes, part.group))

    def _put(self, part: Part, at: int) -> None:
        self.parts.append(part)
        self.offsets.append(at)
        self.nbytes = at + part.nbytes

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [memory[at : at + part.nbytes] for part, at in zip(self.parts, self.offsets, strict=True)]


@dataclass
class OneDevice:
    """The parts on one device."""

    device: torch.device
    early: Staging = field(default_factory=Staging)
    small: Staging = field(default_factory=Staging)
    large: list[Part] = field(default_factory=list)

    def lazy_parts(self) -> list[Part]:
        return [*self.small.parts, *self.large]


@dataclass
class Sources:
    """What depends on the addresses of the state: valid as long as `pointers` are, since it holds the storages."""

    large: list[tuple[int, Part]]
    small: Gather
    small_memory: torch.Tensor
    early: list[torch.Tensor]
    early_staged: tuple[Gather, torch.Tensor] | None  # None: too large to have memory between captures
    held: list[torch.Tensor]


class DevicePlan:
    """What of one layout goes from devices to the arena; `regions` are those concerned.

    Raises:
        CaptureError: a tensor is on a device that is not CUDA's; names it.
    """

    def __init__(self, layout: Layout, walk: Walk, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._first = first_buffers(layout, walk)
        self.regions = frozenset(self._first)
        self._devices: dict[torch.device, OneDevice] = {}
        if self.regions:
            for is_early, arrays in ((True, layout.early), (False, layout.lazy)):
                for part in self._parts(arrays):
                    self._add(part, is_early, walk)
        self._pointers: list[int] = []
        self._sources: dict[torch.device, Sources] = {}
        self._samplers: dict[torch.device, Sampler] = {}

    def _parts(self, arrays: Sequence[Sequence[int]]) -> list[Part]:
        """The pieces of device regions, joined where they lie together in both region and shard."""
        found: list[Part] = []
        size = self._chunk_bytes
        for region, offset, chunk, at, nbytes, group in zip(*arrays, strict=True):
            if region not in self._first:
                continue
            position = chunk * size + at
            last = found[-1] if found else None
            if (
                last is not None
                and last.region == region
                and last.offset + last.nbytes == offset
                and last.position + last.nbytes == position
            ):
                found[-1] = last._replace(nbytes=last.nbytes + nbytes)
            else:
                found.append(Part(region, offset, position, nbytes, group))
        return found

    def _add(self, part: Part, is_early: bool, walk: Walk) -> None:
        device = walk.buffers[self._first[part.region]].device
        one = self._devices.setdefault(device, OneDevice(device))
        if is_early:
            one.early.add(part)
        elif part.nbytes <= SMALL_BYTES:
            one.small.add(part)
        else:
            one.large.append(part)

    # --- one capture --------------------------------------------------------------------------------------------
    def start(
        self, stage: DeviceStage, walk: Walk, binding: Binding, placement: Placement, *,
        chunks: frozenset[int] | None, sampling: Sampling,
    ) -> DeviceCapture:  # fmt: skip
        """Enqueue everything that goes to `chunks` (None: all).

        Raises:
            CaptureError, RuntimeError: CUDA refused; nothing is under way then.
        """
        if binding.pointers != self._pointers:
            self._sources = {device: self._bind(one, walk, binding) for device, one in self._devices.items()}
            self._pointers = binding.pointers
            self._samplers.clear()
        runs = Runs(placement, self._chunk_bytes, chunks)
        works, samples = [], []
        early_nbytes = 0
        for device, one in self._devices.items():
            sources = self._sources[device]
            gather, early_memory = sources.early_staged or _stage_early(one, sources.early)
            early = self._early_copies(one, early_memory, runs)
            lazy = self._lazy_copies(one, sources, runs)
            early_nbytes += sum(copy.nbytes for copy in early)
            first = (
                lazy[0].group if lazy else 0
            )  # early bytes leave before all others: nobody is fenced by them
            copies = [copy._replace(group=first) for copy in early] + lazy
            work = DeviceWork(device, [gather], [sources.small], copies)
            if (sample := self._sample(one, sources, stage.api, sampling)) is not None:
                samples.append(sample)
                work.now.append(sample.gather)
                work.copies.append(sample.copy)
            works.append(work)
        transfer = stage.submit(works, keep=self._sources)
        return DeviceCapture(transfer, samples, early_nbytes)

    def _early_copies(self, one: OneDevice, memory: torch.Tensor, runs: Runs) -> list[Copy]:
        copies: list[Copy] = []
        base = memory.data_ptr()
        for staged, position, nbytes, group in one.early.blocks:
            runs.add(copies, group, base + staged, position, nbytes)
        return copies

    def _lazy_copies(self, one: OneDevice, sources: Sources, runs: Runs) -> list[Copy]:
        """In order of group: a fence waits for no more than it must."""
        copies: list[Copy] = []
        base = sources.small_memory.data_ptr()
        for staged, position, nbytes, group in one.small.blocks:
            runs.add(copies, group, base + staged, position, nbytes)
        for address, part in sources.large:
            runs.add(copies, part.group, address, part.position, part.nbytes)
        return sorted(copies, key=_group)

    def _bind(self, one: OneDevice, walk: Walk, binding: Binding) -> Sources:
        def source(part: Part) -> torch.Tensor:
            buffer = self._first[part.region]
            shift = (
                binding.pointers[buffer] - binding.bases[part.region]
            )  # where the buffer begins in its region
            return flat_bytes(walk.buffers[buffer], part.offset - shift, part.nbytes)

        large = [source(part) for part in one.large]
        small = [source(part) for part in one.small.parts]
        memory = torch.zeros(one.small.nbytes, dtype=torch.uint8, device=one.device)
        early = [source(part) for part in one.early.parts]
        return Sources(
            [(tensor.data_ptr(), part) for tensor, part in zip(large, one.large, strict=True)],
            Gather(one.small.views(memory), small),
            memory,
            early,
            _stage_early(one, early) if one.early.nbytes <= STAGED_BYTES_MAX else None,
            [*small, *large],
        )

    def _sample(
        self, one: OneDevice, sources: Sources, api: DeviceApi, sampling: Sampling
    ) -> DeviceSample | None:
        parts = one.lazy_parts()
        if not sampling.is_on or not parts:
            return None
        sampler = self._samplers.get(one.device)
        move = 0 if sampling.is_full else sampling.turn // (WINDOWS_STAY if has_windows_for_all(parts) else 1)
        if sampler is None or sampler.move != move:
            windows = choose_windows(parts, self._chunk_bytes, move, is_full=sampling.is_full)
            sampler = self._samplers[one.device] = Sampler(windows, sources.held, one.device, api, move)
        return sampler.take()


def _stage_early(one: OneDevice, sources: list[torch.Tensor]) -> tuple[Gather, torch.Tensor]:
    """Memory for the early part of one device, and what brings it there."""
    memory = torch.zeros(one.early.nbytes, dtype=torch.uint8, device=one.device)
    return Gather(one.early.views(memory), sources), memory


def first_buffers(layout: Layout, walk: Walk) -> dict[int, int]:
    """Regions that lie on a device, and the first buffer of each.

    Raises:
        CaptureError: a device that is not CUDA's; names the tensor.
    """
    first: dict[int, int] = {}
    for buffer, region in enumerate(layout.region_of):
        kind = walk.buffers[buffer].device.type
        if kind == "cpu":
            continue
        if kind != "cuda":
            raise CaptureError(f"{walk.names[buffer]} is on a device that cannot be captured", device=kind)
        first.setdefault(region, buffer)
    return first


def _group(copy: Copy) -> int:
    return copy.group


class Runs:
    """Cuts bytes of the shard where the frames of the lane do not lie side by side; leaves out what is not copied."""

    def __init__(self, placement: Placement, chunk_bytes: int, chunks: frozenset[int] | None) -> None:
        self._addresses, self._size, self._chunks = placement.addresses, chunk_bytes, chunks
        addresses = placement.addresses
        self._end = list(range(1, len(addresses) + 1))  # the chunk after the run that this one is in
        for chunk in range(len(addresses) - 2, -1, -1):
            if (
                addresses[chunk] + chunk_bytes == addresses[chunk + 1]
                and placement.segments[chunk] == placement.segments[chunk + 1]
                and (chunks is None or (chunk in chunks) == (chunk + 1 in chunks))
            ):
                self._end[chunk] = self._end[chunk + 1]

    def add(self, out: list[Copy], group: int, source: int, position: int, nbytes: int) -> None:
        """The copies of `nbytes` bytes from `source` to `position` in the shard."""
        size, end = self._size, self._end
        while nbytes:
            chunk, offset = divmod(position, size)
            left = end[chunk] * size - position
            count = nbytes if nbytes <= left else left
            if self._chunks is None or chunk in self._chunks:
                out.append(Copy(group, self._addresses[chunk] + offset, source, count))
            position, source, nbytes = position + count, source + count, nbytes - count


# --- samples ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sampling:
    """Whether samples are taken, which turn it is, and whether they are of everything (`audit="full"`)."""

    is_on: bool
    turn: int
    is_full: bool = False


class Window(NamedTuple):
    """`nbytes` bytes of part number `part` from `offset` on, which the copy has at `position` of the shard."""

    part: int
    region: int
    offset: int
    position: int
    nbytes: int


def choose_windows(parts: Sequence[Part], chunk_bytes: int, move: int, *, is_full: bool) -> list[Window]:
    """A window of each part, or of as many as the share allows, in turns; cut at the borders of chunks.

    Pure. `move` counts on from 0; every byte of every part is in a window sooner or later.
    """
    if is_full:
        return [
            w
            for number, part in enumerate(parts)
            for w in _windows(number, part, 0, part.nbytes, chunk_bytes)
        ]
    count = min(len(parts), _windows_max(parts))
    chosen: list[Window] = []
    for index in range(move * count, (move + 1) * count):
        turn, number = divmod(index, len(parts))  # `turn`: how often this part was chosen before
        part = parts[number]
        offset = turn % -(-part.nbytes // WINDOW_BYTES) * WINDOW_BYTES
        chosen += _windows(number, part, offset, min(WINDOW_BYTES, part.nbytes - offset), chunk_bytes)
    return chosen


def has_windows_for_all(parts: Sequence[Part]) -> bool:
    """Whether the share allows for a window of each part in each capture."""
    return _windows_max(parts) >= len(parts)


def _windows_max(parts: Sequence[Part]) -> int:
    return max(1, sum(part.nbytes for part in parts) // SAMPLED_SHARE // WINDOW_BYTES)


def _windows(number: int, part: Part, offset: int, nbytes: int, chunk_bytes: int) -> list[Window]:
    """These bytes of a part, cut at the borders of chunks."""
    windows = []
    while nbytes:
        position = part.position + offset
        count = min(nbytes, chunk_bytes - position % chunk_bytes)
        windows.append(Window(number, part.region, offset, position, count))
        offset, nbytes = offset + count, nbytes - count
    return windows


class Sampler:
    """Memory for the windows of one device, on it and pinned on the host. One capture at a time uses it."""

    def __init__(
        self, windows: list[Window], sources: list[torch.Tensor], device: torch.device, api: DeviceApi,
        move: int,
    ) -> None:  # fmt: skip
        self.windows, self.move = windows, move
        self.offsets: list[int] = []
        total = 0
        for window in windows:
            self.offsets.append(total)
            total += -(-window.nbytes // _ALIGN) * _ALIGN
        self._kept = torch.empty(total, dtype=torch.uint8, device=device)
        self.host = api.pinned(total)
        into = [self._kept[at : at + window.nbytes] for at, window in zip(self.offsets, windows, strict=True)]
        taken = [sources[w.part][w.offset : w.offset + w.nbytes] for w in windows]
        self._gather = Gather(into, taken)

    def take(self) -> DeviceSample:
        copy = Copy(SAMPLE_GROUP, self.host.data_ptr(), self._kept.data_ptr(), self._kept.numel())
        return DeviceSample(self, self._gather, copy)


@dataclass(frozen=True)
class DeviceSample:
    """What the windows held at the hand-over; on the host once the transfer is over."""

    sampler: Sampler
    gather: Gather
    copy: Copy

    def differing(self, placement: Placement, chunk_bytes: int) -> set[int]:
        """Regions whose copy is not what was handed over; chunks that were not copied are left out."""
        host, read, addresses = self.sampler.host.data_ptr(), ctypes.string_at, placement.addresses
        wrong = set()
        for window, at in zip(self.sampler.windows, self.sampler.offsets, strict=True):
            chunk, offset = divmod(window.position, chunk_bytes)
            if placement.flags[chunk] == native.ENTRY_REUSED or window.region in wrong:
                continue
            if read(host + at, window.nbytes) != read(addresses[chunk] + offset, window.nbytes):
                wrong.add(window.region)
        return wrong


class DeviceCapture:
    """The device's half of one capture."""

    def __init__(self, transfer: DeviceTransfer, samples: list[DeviceSample], early_nbytes: int) -> None:
        self.transfer, self._samples = transfer, samples
        self.early_nbytes = early_nbytes
        self.lazy_nbytes = transfer.progress()[1] - early_nbytes - sum(s.copy.nbytes for s in samples)

    def differing(self, placement: Placement, chunk_bytes: int) -> list[int]:
        """Regions whose sampled bytes are not those of the copy; after the transfer. No call into CUDA."""
        return sorted({region for s in self._samples for region in s.differing(placement, chunk_bytes)})
