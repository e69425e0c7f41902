"""The planner's own Monte Carlo: its formulas against runs of the same cluster, failure by failure.

Nothing here uses the formulas. Latencies, failures during restarts, the order of snapshots and flushes, and which of
them helps after which failure are played out as they come.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from snapd.core.planning import Hazard

BATCHES = 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and half the width of its 95 % interval."""

    mean: float
    half_width: float


def simulate_goodput(
    hazards: Sequence[Hazard],
    *,
    memory_stall_s: float,
    storage_stall_s: float,
    failure_count: int,
    draw: Callable[[], float],
) -> Estimate:
    """Useful time over all time of a job that meets that many failures.

    Args:
        hazards: the mildest first; the interval of the first one is that of all snapshots, the last one's that of
            those that are also stored.
        draw: uniform numbers in [0, 1).
    """
    run = _Run(hazards, memory_stall_s, storage_stall_s, draw)
    ratios = []
    for _ in range(BATCHES):
        useful, passed = run.done * run.interval_s, run.time_s
        for _ in range(max(1, failure_count // BATCHES)):
            run.live_and_fail()
        ratios.append((run.done * run.interval_s - useful) / (run.time_s - passed))
    mean = math.fsum(ratios) / len(ratios)
    variance = math.fsum((ratio - mean) ** 2 for ratio in ratios) / (len(ratios) - 1)
    return Estimate(mean, 2.09 * math.sqrt(variance / len(ratios)))  # Student's t, 19 degrees of freedom


class _Run:
    """A job in time. Snapshots are numbered from 1; every `stride` of a hazard one is of the kind that helps it."""

    def __init__(
        self,
        hazards: Sequence[Hazard],
        memory_stall_s: float,
        storage_stall_s: float,
        draw: Callable[[], float],
    ) -> None:
        self.hazards = hazards
        self.interval_s = hazards[0].interval_s
        self.done = 0
        self.time_s = 0.0
        self._length_s = self.interval_s + memory_stall_s
        self._storage_stall_s = storage_stall_s
        self._strides = [max(1, round(hazard.interval_s / self.interval_s)) for hazard in hazards]
        self._newest = [0] * len(hazards)  # per hazard: the snapshot that it would go back to
        self._rate = math.fsum(hazard.rate for hazard in hazards)
        self._draw = draw

    def _until_failure_s(self) -> float:
        return -math.log(1 - self._draw()) / self._rate

    def _which(self) -> int:
        point = self._draw() * self._rate
        for i, hazard in enumerate(self.hazards):
            point -= hazard.rate
            if point < 0:
                return i
        return len(self.hazards) - 1

    def _taken_after_s(self, number: int) -> float:
        """From the last restart until the stall of that snapshot is over."""
        stored = number // self._strides[-1] - self.done // self._strides[-1]
        return (number - self.done) * self._length_s + stored * self._storage_stall_s

    def _newest_before(self, moment_s: float, stride: int) -> int:
        """The last snapshot taken by then that is a multiple of the stride, or the one that the job began with."""
        number = self.done + int(moment_s / self._length_s) if moment_s > 0 else self.done
        while number > self.done and (number % stride or self._taken_after_s(number) > moment_s):
            number -= 1
        return number

    def live_and_fail(self) -> None:
        """Train until the next failure and get over it."""
        life_s = self._until_failure_s()
        for i, hazard in enumerate(self.hazards):
            found = self._newest_before(life_s - hazard.latency_s, self._strides[i])
            if found > self.done:
                self._newest[i] = found
        self.time_s += life_s
        worst = self._which()
        while True:
            restart_s = self.hazards[worst].restart_s
            next_s = self._until_failure_s()
            if next_s >= restart_s:
                break
            self.time_s += next_s
            worst = max(worst, self._which())
        self.time_s += restart_s
        self.done = self._newest[worst]
        # What is restored is in memory again; nothing newer is left anywhere.
        self._newest = [
            self.done if i <= worst else min(newest, self.done) for i, newest in enumerate(self._newest)
        ]


def simulate_survival(
    group_sizes: Sequence[int], m: int, lost: int, *, trials: int, draw: Callable[[], float]
) -> Estimate:
    """How often no group loses more than `m` of its nodes when `lost` nodes, any as likely, go at once."""
    group_of = [number for number, size in enumerate(group_sizes) for _ in range(size)]
    good = 0
    for _ in range(trials):
        gone: set[int] = set()
        while len(gone) < lost:
            gone.add(int(draw() * len(group_of)))
        good += max(Counter(group_of[node] for node in gone).values(), default=0) <= m
    mean = good / trials
    # A few cases more of either kind keep the interval honest near 0 and 1.
    likely = (good + 2) / (trials + 4)
    return Estimate(mean, 1.96 * math.sqrt(likely * (1 - likely) / (trials + 4)))
