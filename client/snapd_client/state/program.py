"""The quick way through a tree whose structure is known.

A full walk notes every container that it read and every object that it found there. The next capture reads
the same containers again, compares by identity, and needs a full walk only where something else than a leaf's
value, or a tensor by another of the same kind, has changed. Costs about 50 ns per object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress, count
from operator import is_not

import torch
from torch.distributed.tensor import DTensor

from .tensors import component_names

Source = Callable[[], Iterable[object]]
FIXED, FREE = -1, -2


class Program:
    """What was read, and what may be there next time.

    `slots[i]` is the outermost tensor number i; `leaves[i]` the value of leaf number i. A position is an
    index into the concatenation of all sources; one that is neither tensor nor leaf nor free is fixed.
    """

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._found: list[object] = []
        self._slot_at: dict[int, int] = {}
        self._leaf_at: dict[int, int] = {}
        self._free: set[int] = set()
        self._any: set[int] = set()
        self._seen: set[int] = set()
        self._shared: set[int] = set()  # slots found at more than one position
        self.slots: list[torch.Tensor] = []
        self.leaves: list[object] = []

    # --- written by the full walk -----------------------------------------------------------------
    def watch(self, source: Source) -> int:
        """Read a container now and at each capture; returns the position of its first object."""
        first = len(self._found)
        self._sources.append(source)
        self._found.extend(source())
        return first

    def add_slot(self, tensor: torch.Tensor) -> int:
        self.slots.append(tensor)
        return len(self.slots) - 1

    def see_slot(self, number: int, at: int) -> None:
        """The tensor number `number` is found here too; at -1: where nobody can exchange it."""
        if number in self._seen:
            self._shared.add(number)
        self._seen.add(number)
        if at >= 0:
            self._slot_at[at] = number

    def add_leaf(self, value: object, at: int) -> int:
        number = len(self.leaves)
        self.leaves.append(value)
        if at >= 0:
            self._leaf_at[at] = number
        return number

    def free(self, at: int) -> None:
        """Whatever is at this position is nobody's business, as long as it stays of the same type."""
        self._free.add(at)

    def free_of_any(self, at: int) -> None:
        """Whatever is at this position is nobody's business, of any type."""
        self._free.add(at)
        self._any.add(at)

    # --- at each capture --------------------------------------------------------------------------
    def refresh(self, accepts_leaf: Callable[[object, object], bool]) -> tuple[list[int], list[int]] | None:
        """Read everything again. Returns the numbers of the slots and leaves that hold another object now.

        None: the structure may have changed, walk it in full.
        """
        now: list[object] = []
        extend = now.extend
        for source in self._sources:
            extend(source())
        before = self._found
        if len(now) != len(before):
            return None
        slots: list[int] = []
        leaves: list[int] = []
        for position in compress(count(), map(is_not, now, before)):
            value = now[position]
            leaf = self._leaf_at.get(position)
            if leaf is not None and accepts_leaf(value, before[position]):
                self.leaves[leaf] = value
                leaves.append(leaf)
                continue
            slot = self._slot_at.get(position)
            if slot is not None and self.replaces(value, slot):
                slots.append(slot)
                continue
            if position not in self._free:
                return None
            if position not in self._any and type(value) is not type(before[position]):
                return None
        self._found = now
        return slots, leaves

    def replaces(self, value: object, slot: int) -> bool:
        """Whether `value` is this slot's tensor or another of the same kind; it is then taken in."""
        old = self.slots[slot]
        if value is old:
            return True
        if (
            slot in self._shared
            or type(value) is not type(old)
            or not isinstance(value, torch.Tensor)
            or value.dtype != old.dtype
            or value.shape != old.shape
            or value.stride() != old.stride()
            or value.device != old.device
            or value.is_inference() != old.is_inference()
            or (component_names(value) and not _has_same_spec(value, old))
        ):
            return False
        if any(value is other for other in self.slots):
            return False  # it is known under another number: aliasing has changed
        self.slots[slot] = value
        return True


def _has_same_spec(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two wrappers have components alike: known of DTensors only."""
    return isinstance(one, DTensor) and isinstance(other, DTensor) and bool(one._spec == other._spec)
