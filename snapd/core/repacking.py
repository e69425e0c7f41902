"""Which packs of a tier are rewritten because little of them is alive. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LIVE_MIN = 0.25  # of a pack's bytes; below it the pack is rewritten whatever the others are like
STORED_PER_LIVE_MAX = 1.4  # of all packs together


@dataclass(frozen=True, slots=True)
class PackUse:
    """`nbytes`: of the object. `live_nbytes`: of the stored chunks in it that a kept snapshot names."""

    nbytes: int
    live_nbytes: int


@dataclass(frozen=True, slots=True)
class Repacking:
    packs: frozenset[str]
    reason: str
    stored_nbytes: int = 0
    live_nbytes: int = 0

    @property
    def ratio(self) -> float:
        return self.stored_nbytes / self.live_nbytes if self.live_nbytes else 1.0


def choose_packs(uses: Mapping[str, PackUse]) -> Repacking:
    """Those of which under a quarter is alive, and then the emptiest until stored / live is at most 1.4."""
    stored = sum(use.nbytes for use in uses.values())
    live = sum(use.live_nbytes for use in uses.values())
    chosen: set[str] = set()
    left = stored
    for name, use in sorted(
        uses.items(), key=lambda pair: (pair[1].live_nbytes / max(1, pair[1].nbytes), pair[0])
    ):
        if use.live_nbytes >= LIVE_MIN * use.nbytes and left <= STORED_PER_LIVE_MAX * live:
            break
        if use.live_nbytes >= use.nbytes:
            break
        chosen.add(name)
        left -= use.nbytes - use.live_nbytes
    if not chosen:
        return Repacking(frozenset(), "enough of each pack is alive", stored, live)
    return Repacking(
        frozenset(chosen),
        f"{stored} bytes are stored for {live} alive: {len(chosen)} packs are rewritten, then {left} are",
        stored,
        live,
    )
