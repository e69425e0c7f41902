"""Comparing bytes that two ranks hold alike, where they lie."""

from __future__ import annotations

from collections.abc import Sequence

from snapd_native import CopyPlan

from snapd.core.replicas import Piece
from snapd.memory.segments import SegmentSet


def differing_pieces(one: SegmentSet, other: SegmentSet, pieces: Sequence[Piece]) -> list[int]:
    """The numbers of the pieces that differ, ascending. Blocking, without the GIL; run it in a thread."""
    if not pieces:
        return []
    numbers = range(len(pieces))
    plan = CopyPlan(
        list(numbers),
        [piece.starts[0] for piece in pieces],
        list(numbers),
        [piece.starts[1] for piece in pieces],
        [piece.nbytes for piece in pieces],
        [0] * len(pieces),
    )
    sources = [one.address(piece.places[0], piece.starts[0] + piece.nbytes) for piece in pieces]
    destinations = [other.address(piece.places[1], piece.starts[1] + piece.nbytes) for piece in pieces]
    return list(plan.differing(sources, destinations))
