"""The capture interval of one generation: widened when a rank had to skip for want of a free slot, narrowed
again later.

All ranks must skip the same steps, so a change always holds from a step that no rank can have reached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

LEAD_STEPS = 16
NARROW_AFTER_COMPLETE = 64


@dataclass(frozen=True, slots=True)
class Interval:
    """`factor` x `configured` steps hold from `from_step` on (factor 1: as configured)."""

    configured: int = 1
    factor: int = 1
    from_step: int = 0
    complete_since: int = 0

    @property
    def steps(self) -> int:
        return self.configured * self.factor


def after_abort(interval: Interval, *, newest_step_seen: int, factor_max: int) -> tuple[Interval, str]:
    """Double the interval from an agreed later step on; one doubling at a time, up to `factor_max`."""
    fresh = replace(interval, complete_since=0)
    if newest_step_seen < interval.from_step:
        return fresh, "a change is under way already"
    if interval.factor * 2 > factor_max:
        return fresh, "at its bound"
    wider = interval.factor * 2
    from_step = _agreed_step(newest_step_seen, interval.configured * wider)
    return replace(fresh, factor=wider, from_step=from_step), "a rank found no free slot"


def after_complete(interval: Interval, *, newest_step_seen: int) -> tuple[Interval, str]:
    """Halve a widened interval after 64 snapshots in a row were complete."""
    if interval.factor == 1:
        return interval, "as configured"
    count = interval.complete_since + 1
    if count < NARROW_AFTER_COMPLETE or newest_step_seen < interval.from_step:
        return replace(interval, complete_since=count), "not yet"
    narrower = interval.factor // 2
    from_step = _agreed_step(newest_step_seen, interval.configured * interval.factor)
    return replace(
        interval, factor=narrower, from_step=from_step, complete_since=0
    ), "no rank has waited for long"


def _agreed_step(newest_step_seen: int, steps: int) -> int:
    """The first multiple of `steps` that lies well ahead of every rank."""
    ahead = newest_step_seen + max(LEAD_STEPS, steps)
    return -(-ahead // steps) * steps
