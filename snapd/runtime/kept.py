"""What was read lately and may be wanted again, up to a total weight."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The least recently used go first. What is heavier than all of `weight_max` is kept alone."""

    def __init__(self, weight_max: int) -> None:
        self._weight_max = weight_max
        self._weight = 0
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, weight: int) -> None:
        """Keep it, or replace what is kept under that key."""
        former = self._entries.pop(key, None)
        self._weight += weight - (former[1] if former is not None else 0)
        self._entries[key] = (value, weight)
        while self._weight > self._weight_max and len(self._entries) > 1:
            _, (_, gone) = self._entries.popitem(last=False)
            self._weight -= gone

    def clear(self) -> None:
        self._entries.clear()
        self._weight = 0

    def __len__(self) -> int:
        return len(self._entries)
