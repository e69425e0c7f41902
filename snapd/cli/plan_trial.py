"""`snapd plan --check`: each formula beside the Monte Carlo of the same thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snapd.core.planning import Plan
from snapd.core.planning_check import Estimate, simulate_goodput, simulate_survival

FAILURES = 20_000
TRIALS = 4_000
LOSSES_CHECKED = (2, 8, 32)
GOODPUT_TOLERANCE = 0.01  # of the formula: it takes latencies for longer restarts, and means for what varies
SURVIVAL_TOLERANCE = 0.002  # that formula is exact; a few rare cases in so many trials


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a formula says and what was found."""

    plan: str
    quantity: str
    formula: float
    found: Estimate
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.formula - self.found.mean) <= self.tolerance + 1.5 * self.found.half_width


def compare(plans: Sequence[Plan], draw: Callable[[], float]) -> list[Agreement]:
    """Goodput of every plan, and survival of those with parity."""
    result = []
    for plan in plans:
        found = simulate_goodput(
            plan.hazards,
            memory_stall_s=plan.levels.memory_stall_s,
            storage_stall_s=plan.levels.storage_stall_s,
            failure_count=FAILURES,
            draw=draw,
        )
        result.append(Agreement(plan.name, "goodput", plan.goodput, found, GOODPUT_TOLERANCE))
        sizes = [size for size, count in plan.group_sizes.items() for _ in range(count)]
        for lost in LOSSES_CHECKED:
            if plan.code is not None and lost in plan.survival:
                seen = simulate_survival(sizes, plan.code.m, lost, trials=TRIALS, draw=draw)
                name = f"survival of {lost} nodes lost"
                result.append(Agreement(plan.name, name, plan.survival[lost], seen, SURVIVAL_TOLERANCE))
    return result
