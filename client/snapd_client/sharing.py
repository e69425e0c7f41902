"""Which captures are shared out between the ranks of a node that hold the same bytes, and which are full.

A rank's first capture of a structure is full, and so is one in every `RECHECK_TURNS`: the daemon compares those of all
ranks of the node and says up to which step it found them equal (a word of the control page). In between each rank
copies its part only. Ranks need not agree on when they switch: who keeps a tensor follows from its name, and the shard
of that rank has it either way.
"""

from __future__ import annotations

from snapd_native import REPLICAS_DIFFER, ControlPage

from .lanes import RECHECK_TURNS
from .plans import LayoutPlans
from .world import World

WORD = "replicas_equal_step_plus_one"
FULL, SHARED_OUT, DIFFER = "full", "shared out", "differ"


def is_shared_out(
    step: int, *, equal_step_plus_one: int, first_full: int | None, last_full: int | None, period: int
) -> bool:
    """Whether the capture of `step` leaves to other ranks what they keep. Pure.

    Args:
        equal_step_plus_one: the daemon's word.
        first_full, last_full: steps of this structure's full captures; None: there was none yet.
        period: one capture is full in every stretch of so many steps, counted from step 0, so that all ranks have
            theirs at the same step whatever one of them skipped before.
    """
    if first_full is None or last_full is None or equal_step_plus_one == REPLICAS_DIFFER:
        return False
    return first_full < equal_step_plus_one and step // period == last_full // period


class Sharing:
    """The choice for one rank. Used by the training thread only."""

    def __init__(self, world: World) -> None:
        first = world.rank - world.local_rank
        self.node_ranks = range(first, first + world.local_world_size)
        self.plans: LayoutPlans | None = None  # shared out; made when it is first needed
        self._first_full: int | None = None
        self._last_full: int | None = None
        self._was_full = True

    @property
    def is_possible(self) -> bool:
        """Whether there are other ranks on this node at all."""
        return len(self.node_ranks) > 1

    def announce(self, page: ControlPage) -> None:
        """Tell the daemon which ranks' replicas it has to compare."""
        page.store("node_first_rank", self.node_ranks.start)
        page.store("node_rank_count", len(self.node_ranks))

    def forget(self) -> None:
        """Another structure, or another generation: nothing that was compared counts any more."""
        self.plans = self._first_full = self._last_full = None

    def is_due(self, page: ControlPage, step: int, interval: int) -> bool:
        """Whether this step's capture is shared out."""
        return self.is_possible and is_shared_out(
            step,
            equal_step_plus_one=page.load(WORD),
            first_full=self._first_full,
            last_full=self._last_full,
            period=interval * RECHECK_TURNS,
        )

    def note(self, step: int, *, is_full: bool) -> None:
        """A capture was handed over."""
        self._was_full = is_full
        if is_full:
            self._first_full = step if self._first_full is None else self._first_full
            self._last_full = step

    def state(self, page: ControlPage) -> str:
        """For `health()`: of the last capture, "full" or "shared out"; "differ" if the daemon found a difference."""
        if self.is_possible and page.load(WORD) == REPLICAS_DIFFER:
            return DIFFER
        return FULL if self._was_full else SHARED_OUT
