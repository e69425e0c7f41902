"""Where each tensor of a snapshot goes: into the live storage where it fits, else into new memory.

A live tensor is *claimed* by at most one saved tensor. A region is written directly if all its tensors were
claimed, lie in the memory of one device or the host with the saved strides, and in the same places relative to each
other; otherwise into host memory of its own, from which `finish` copies. New tensors on a device are written directly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from snapd_proto import format_pb2 as pb
from torch.distributed.tensor import DTensor

from ..errors import IntegrityError
from .boxes import Part
from .classes import Vouched, find_class, type_name
from .decode import Decoder
from .encode import encode_plain
from .meshes import new_dtensor, spec_difference
from .tensors import component, component_names, dtypes, span_nbytes, subclass_context
from .transfers import Elsewhere, RestorePlan, check_bounds, plan_copies


class Destinations:
    """Claims, then `allocate`, then the bytes arrive, then `finish`; `tensor(i)` gives the object from
    `allocate` on.
    """

    def __init__(
        self,
        layout: pb.ShardLayout,
        vouched: Vouched,
        others: Mapping[int, pb.ShardLayout] | None = None,
        fills: Mapping[int, Sequence[Part]] | None = None,
    ) -> None:
        """`fills`: regions that are put together from parts of several shards (recut.py)."""
        self._layout, self._vouched, self._fills = layout, vouched, fills or {}
        self._elsewhere = Elsewhere(layout, others or {})
        self._live: dict[int, torch.Tensor] = {}
        self._claimed: set[int] = set()
        self._made: dict[int, torch.Tensor] = {}
        self._dropped: set[int] = set()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._bases: dict[int, int] = {}
        self.device_of: dict[int, torch.device] = {}  # where the bases that are no host memory lie
        self._kept: list[torch.Tensor | torch.UntypedStorage] = []
        self._plain = [i for i, tensor in enumerate(layout.tensors) if not tensor.HasField("subclass")]
        self._parameter_of: dict[str, int] = {}
        for number, tensor in enumerate(layout.tensors):
            if tensor.is_parameter:
                self._parameter_of.setdefault(tensor.parameter_name, number)
        check_bounds(layout, self._fills)

    # --- claiming ---------------------------------------------------------------------------------
    def difference(self, number: int, live: torch.Tensor) -> str:
        """Why the saved tensor cannot be written into the live one; empty if it can."""
        saved = self._layout.tensors[number]
        if tuple(saved.shape) != tuple(live.shape):
            return f"shape {list(saved.shape)} in the snapshot, {list(live.shape)} here"
        if dtypes.get(saved.dtype) != live.dtype:
            return f"dtype {saved.dtype} in the snapshot, {str(live.dtype).removeprefix('torch.')} here"
        names = component_names(live)
        if [part.attribute for part in saved.subclass.components] != names:
            there = saved.subclass.type_name or "a plain tensor"
            return f"{there} in the snapshot, {type_name(type(live))} here"
        if not names:
            return ""
        if isinstance(live, DTensor):
            difference = spec_difference(saved.distributed, live)
        elif saved.subclass.type_name != type_name(type(live)):
            difference = f"{saved.subclass.type_name} in the snapshot, {type_name(type(live))} here"
        else:
            context = encode_plain(subclass_context(live), self._vouched, saved.name)
            difference = "" if context == saved.subclass.context else "its parts are described otherwise here"
        if difference:
            return difference
        for part in saved.subclass.components:
            difference = self.difference(part.tensor, component(live, part.attribute))
            if difference:
                return f"its part {part.attribute}: {difference}"
        return ""

    def claim(self, number: int, live: torch.Tensor) -> bool:
        """Write saved tensor `number` into `live`; False if it does not fit or is taken by another."""
        known = self._live.get(number)
        if known is not None:
            return known is live
        if id(live) in self._claimed or self.difference(number, live):
            return False
        self._claim(number, live)
        return True

    def _claim(self, number: int, live: torch.Tensor) -> None:
        self._claimed.add(id(live))
        self._live[number] = live
        for part in self._layout.tensors[number].subclass.components:
            self._claim(part.tensor, component(live, part.attribute))

    def drop(self, number: int) -> None:
        """Leave this tensor of the snapshot out."""
        self._dropped.add(number)
        for part in self._layout.tensors[number].subclass.components:
            self.drop(part.tensor)

    def live(self, number: int) -> torch.Tensor | None:
        return self._live.get(number)

    # --- memory -----------------------------------------------------------------------------------
    def overlaps(self) -> list[tuple[int, int]]:
        """Pairs of saved tensors without shared bytes whose live tensors share some. The second loses its
        claim.
        """
        spans = []
        for number in self._plain:
            live = self._live.get(number)
            if live is not None and live.numel():
                saved = self._layout.tensors[number]
                nbytes = span_nbytes(tuple(live.shape), live.stride(), live.itemsize)
                spans.append(
                    (live.device.index or 0, live.data_ptr(), live.data_ptr() + nbytes, saved.region, number)
                )
        spans.sort()
        found = []
        last: tuple[int, int, int, int, int] | None = None
        for span in spans:
            if last is not None and span[0] == last[0] and span[1] < last[2] and span[3] != last[3]:
                found.append((last[4], span[4]))
                continue
            if last is None or span[2] > last[2] or span[0] != last[0]:
                last = span
        return found

    def unclaim(self, number: int) -> None:
        """The tensor gets memory of its own instead."""
        self._live.pop(number, None)

    def allocate(self) -> None:
        """Choose the memory of every region that is wanted. Nothing live is touched."""
        members: dict[int, list[int]] = defaultdict(list)
        for number in self._plain:
            if number not in self._dropped:
                members[self._layout.tensors[number].region].append(number)
        fresh: dict[int, list[int]] = defaultdict(list)  # storage alias -> regions without a live place
        for region, numbers in members.items():
            base = self._direct_base(region, numbers)
            if base is None:
                fresh[self._layout.tensors[numbers[0]].storage_alias].append(region)
            else:
                self._bases[region] = base
        for regions in fresh.values():
            self._allocate_storage(regions, members)

    def _direct_base(self, region: int, numbers: list[int]) -> int | None:
        bases = set()
        for number in numbers:
            live, saved = self._live.get(number), self._layout.tensors[number]
            if live is None or list(live.stride()) != list(saved.strides):
                return None
            if saved.live_strides or live.is_conj() or live.is_neg():  # its bytes are not the saved ones
                return None
            bases.add((live.data_ptr() - saved.region_offset, live.device))
        if len(bases) != 1:
            return None
        base, device = bases.pop()
        if device.type != "cpu":
            if not self._can_be_written(region, device):
                return None
            self.device_of[base] = device
        return int(base)

    def _can_be_written(self, region: int, device: torch.device) -> bool:
        """Whether chunks may be copied straight to this device; many short runs go through the host."""
        return device.type == "cuda" and region not in self._fills

    def _allocate_storage(self, regions: list[int], members: dict[int, list[int]]) -> None:
        """Regions of one storage get one storage; tensors that have a live place are copied there later."""
        tensors = self._layout.tensors
        numbers = [number for region in regions for number in members[region]]
        nbytes = max(tensors[number].storage_offset + tensors[number].nbytes for number in numbers)
        lowest = min(tensors[number].storage_offset for number in numbers) // 64 * 64
        direct = self._direct_device(regions, numbers)
        storage = _new_storage(nbytes - lowest, direct)
        self._kept.append(storage)
        for region in regions:
            first = tensors[members[region][0]]
            self._bases[region] = storage.data_ptr() + first.storage_offset - lowest - first.region_offset
            if direct is not None:
                self.device_of[self._bases[region]] = direct
        if direct is not None:
            self._made.update((number, _view(storage, tensors[number], lowest)) for number in numbers)
            return
        on_device: dict[torch.device, torch.UntypedStorage] = {}
        for number in numbers:
            host = _view(storage, tensors[number], lowest)
            live = self._live.get(number)
            device = torch.device("cpu") if live is not None else self._device(tensors[number])
            if live is not None:
                self._copies.append((live, host))
            elif tensors[number].live_strides:
                self._made[number] = torch.empty_strided(
                    host.shape, tuple(tensors[number].live_strides), dtype=host.dtype, device=device
                )
                self._copies.append((self._made[number], host))
            elif device.type == "cpu":
                self._made[number] = host
            else:
                if device not in on_device:
                    on_device[device] = _new_storage(nbytes - lowest, device)
                self._made[number] = _view(on_device[device], tensors[number], lowest)
                self._copies.append((self._made[number], host))

    def _direct_device(self, regions: list[int], numbers: list[int]) -> torch.device | None:
        """The device on which all these tensors are made anew, if they are, and just as they were saved."""
        if any(number in self._live or self._layout.tensors[number].live_strides for number in numbers):
            return None
        devices = {self._device(self._layout.tensors[number]) for number in numbers}
        device = devices.pop()
        is_direct = not devices and all(self._can_be_written(region, device) for region in regions)
        return device if is_direct else None

    def _device(self, saved: pb.Tensor) -> torch.device:
        """The saved device; a GPU's number is that of the GPU where the owner of the state lives now."""
        device = torch.device(saved.device)
        if device.type == "cpu":
            return device
        owner = self._owner(saved)
        return device if owner is None else owner.device

    # --- afterwards -------------------------------------------------------------------------------
    def tensor(self, number: int) -> torch.Tensor:
        """The object that stands for the saved tensor: the live one, or the new one."""
        found = self._live.get(number)
        if found is None:
            found = self._made.get(number)
        if found is None:
            found = self._made[number] = self._new_wrapper(number)
        return found

    def _new_wrapper(self, number: int) -> torch.Tensor:
        saved = self._layout.tensors[number]
        parts = {part.attribute: self.tensor(part.tensor) for part in saved.subclass.components}
        if not parts:
            raise IntegrityError("a tensor was left out but is referred to", tensor=saved.name)
        if saved.HasField("distributed"):
            return new_dtensor(saved, next(iter(parts.values())), self._owner(saved))
        cls: Any = find_class(saved.subclass.type_name)
        if cls is None or not issubclass(cls, torch.Tensor) or not self._vouched.allows(cls):
            raise IntegrityError(
                "a tensor class of the snapshot is not known here",
                type=saved.subclass.type_name,
                tensor=saved.name,
            )
        context = Decoder(vouched=self._vouched).decode(saved.subclass.context)
        made: torch.Tensor = cls.__tensor_unflatten__(
            parts, context, torch.Size(saved.shape), tuple(saved.strides)
        )
        return made

    def _owner(self, saved: pb.Tensor) -> torch.Tensor | None:
        """The live parameter that a tensor of optimizer state belongs to."""
        return self._live.get(self._parameter_of.get(saved.parameter_name, -1))

    def plan(self) -> RestorePlan:
        """The copies from chunks to destinations, sorted by chunk."""
        return plan_copies(self._layout, self._bases, self._elsewhere, self._fills)

    def finish(self) -> None:
        """All bytes have arrived: copy what could not be written directly, and tell the version counters."""
        with torch.no_grad():
            for target, host in self._copies:
                target.copy_(host)
        written = [live for live in self._live.values() if not live.is_inference()]
        if written:
            torch.autograd.graph.increment_version(written)
        self._kept.clear()


def _view(storage: torch.UntypedStorage, saved: pb.Tensor, lowest: int) -> torch.Tensor:
    dtype = dtypes[saved.dtype]
    first = (saved.storage_offset - lowest) // dtype.itemsize
    with torch.no_grad():
        empty = torch.empty(0, dtype=dtype, device=storage.device)
        return empty.set_(storage, first, tuple(saved.shape), tuple(saved.strides))


def _new_storage(nbytes: int, device: torch.device | None = None) -> torch.UntypedStorage:
    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]
