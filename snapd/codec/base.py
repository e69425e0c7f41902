"""What the coding pipeline asks of an erasure code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Codec(Protocol):
    """A systematic code over `k` data and `m` parity fragments of equal size. Stateless; safe from several threads."""

    @property
    def k(self) -> int: ...

    @property
    def m(self) -> int: ...

    def encode(self, data: Sequence[memoryview | None], parity: Sequence[memoryview]) -> None:
        """Fill `parity` (m writable views of nbytes each) from `data`.

        `data`: k fragments of at most nbytes each, in order; shorter ones and None count as padded with zeros. Works in
        pieces, so that its own memory does not depend on nbytes.
        """

    def decode(
        self, present: Mapping[int, memoryview | None], wanted: Mapping[int, memoryview], nbytes: int
    ) -> None:
        """Fill `wanted` from `present`: fragment number (0..k-1 data, k..k+m-1 parity) -> view.

        A present data fragment that is None or shorter than nbytes counts as padded with zeros; a wanted view that is
        shorter gets the beginning of its fragment.

        Raises:
            NotRestorable: kind `fragments`: fewer than k are present.
        """
