"""A moment by which a transfer has to be done."""

from __future__ import annotations

from collections.abc import Callable


class Deadline:
    """`seconds` from now on the clock that is passed in."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._at_s = clock() + seconds

    def remaining_s(self) -> float:
        """Above 0; raise TimeoutError when nothing is left."""
        left = self._at_s - self._clock()
        if left <= 0:
            raise TimeoutError("no time left")
        return left

    def within(self, seconds: float) -> Deadline:
        """The sooner of this one and `seconds` from now."""
        left = self._at_s - self._clock()
        return Deadline(self._clock, min(left, seconds))

    @property
    def is_over(self) -> bool:
        return self._at_s <= self._clock()
