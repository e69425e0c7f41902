"""Who of a generation is there, and whether older ones are over: what a restore's round waits for.

Pure; one pass over the reports for each change, whoever waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from snapd.core.reports import NodeReport


@dataclass(frozen=True, slots=True)
class Presence:
    """As the reports say of one generation. `served`: its ranks with a live session. `is_closed`: no node that has
    anything of the job takes up captures of older ones any more. `is_overtaken`: a newer generation has begun.
    """

    served: frozenset[int]
    is_closed: bool
    is_overtaken: bool

    def missing(self, world_size: int) -> list[int]:
        """The ranks without a session."""
        return [rank for rank in range(world_size) if rank not in self.served]

    def is_settled(self, world_size: int) -> bool:
        """A restore may be decided: all ranks are there, and what older generations leave is known."""
        return self.is_closed and not self.missing(world_size)

    def lost(self, world_size: int) -> set[int]:
        """Ranks whose trainers are gone. While nobody at all is served, and nothing newer has begun, the nodes have
        only not reported yet.
        """
        return set(self.missing(world_size)) if self.served or self.is_overtaken else set()


def presence(reports: Iterable[NodeReport], generation: int) -> Presence:
    """What the newest report of each node says of a generation."""
    served: set[int] = set()
    is_closed, is_overtaken = True, False
    for report in reports:
        if report.generation == generation:
            served.update(report.served)
        is_overtaken = is_overtaken or report.generation > generation
        if (report.served or report.held) and report.closed_below < generation:
            is_closed = False
    return Presence(frozenset(served), is_closed, is_overtaken)
