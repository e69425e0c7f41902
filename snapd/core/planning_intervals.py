"""How often to snapshot: expected goodput, and the intervals that make it best.

Words: `stall_s`, time that training waits for one snapshot. `interval_s`, useful time between two. `mtbf_s`, mean time
between failures of the whole job. `restart_s`, from a failure until training goes on: detection, replacement, start,
restore; in it counts the latency of the snapshot (its time from the stall to being usable), since that much more work
is done again. Failures come at a constant rate, also during restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_S_MAX = 30 * 86_400.0
_GOLDEN = (math.sqrt(5) - 1) / 2


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """First order: stall and lost work balance."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Higher order; from a stall of twice the MTBF on, the MTBF."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    half = stall_s / (2 * mtbf_s)
    return young_interval_s(stall_s, mtbf_s) * (1 + math.sqrt(half) / 3 + half / 9) - stall_s


def exact_interval_s(stall_s: float, mtbf_s: float) -> float:
    """The interval with the best `goodput`, whatever the restart takes."""
    # T = interval + stall solves (T - stall) / M = 1 - exp(-T / M); the left side overtakes the right one once.
    low, high = stall_s, stall_s + mtbf_s
    for _ in range(200):
        middle = (low + high) / 2
        if (middle - stall_s) / mtbf_s < -math.expm1(-middle / mtbf_s):
            low = middle
        else:
            high = middle
    return low - stall_s


def goodput(interval_s: float, *, stall_s: float, restart_s: float, mtbf_s: float) -> float:
    """Useful time over all time, exactly, for snapshots of one level."""
    exponent = (interval_s + stall_s) / mtbf_s
    if exponent + restart_s / mtbf_s > 700:
        return 0.0
    return interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent))


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevels:
    """Snapshots in memory and, every so many of them, in storage; failures that the one or only the other heals.

    Rates are failures of the job a second. The restart times contain the latencies.
    """

    memory_rate: float
    storage_rate: float
    memory_stall_s: float
    storage_stall_s: float
    memory_restart_s: float
    storage_restart_s: float

    @property
    def rate(self) -> float:
        return self.memory_rate + self.storage_rate

    def first_order(self) -> tuple[float, float]:
        """Both intervals, each by Young's formula for its own failures."""
        memory_s = (
            young_interval_s(self.memory_stall_s, 1 / self.memory_rate) if self.memory_rate else math.inf
        )
        storage_s = (
            young_interval_s(self.storage_stall_s, 1 / self.storage_rate) if self.storage_rate else math.inf
        )
        return min(memory_s, INTERVAL_S_MAX), min(storage_s, INTERVAL_S_MAX)

    def goodput(self, memory_interval_s: float, storage_interval_s: float) -> float:
        """Useful time over all time, exactly but for the latencies.

        A pattern is n segments, each an interval and its stall, the last one with the storage's stall too. A failure
        that memory heals repeats a segment, any other the pattern; one during a restart from storage begins that again.
        """
        count = max(1.0, storage_interval_s / memory_interval_s)
        length_s = memory_interval_s + self.memory_stall_s
        worst = self.rate * (length_s + self.storage_stall_s + self.memory_restart_s + self.storage_restart_s)
        if worst > 600:
            return 0.0
        time_s, stays = self._segment(length_s)
        last_s, last_stays = self._segment(length_s + self.storage_stall_s)
        before = math.pow(stays, count - 1)  # no restart from storage in all segments but the last
        tries = count - 1 if abs(1 - stays) < 1e-12 else (1 - before) / (1 - stays)
        done = before * last_stays
        if done <= 0:
            return 0.0
        anew_s = math.expm1(self.rate * self.storage_restart_s) / self.rate
        total_s = (tries * time_s + before * last_s + (1 - done) * anew_s) / done
        return count * memory_interval_s / total_s

    def _segment(self, length_s: float) -> tuple[float, float]:
        """(Expected time in a segment until it is done or only storage helps, probability that it gets done)."""
        rate, healed = self.rate, self.memory_rate / self.rate
        passes = math.exp(-rate * length_s)
        restarts = math.exp(-rate * self.memory_restart_s)
        # A restart from memory that fails is begun again, if memory heals that failure too.
        leaves = 1 - (1 - restarts) * healed
        again = 1 - (1 - passes) * healed * restarts / leaves
        time_s = ((1 - passes) + (1 - passes) * healed * (1 - restarts) / leaves) / rate
        return time_s / again, passes / again

    def best(self, *, memory_min_s: float, storage_min_s: float) -> tuple[float, float]:
        """The intervals with the best goodput that are not below these."""
        first, second = self.first_order()
        memory_s = max(first if self.memory_rate else second, memory_min_s)
        storage_s = max(second, storage_min_s, memory_s)
        for _ in range(6):  # the optimum is flat: two rounds are enough
            memory_s = self._best_memory(storage_s, memory_min_s)
            storage_s = self._best_storage(memory_s, max(storage_min_s, memory_s))
        return memory_s, storage_s

    def _best_memory(self, storage_s: float, low: float) -> float:
        return _argmax(lambda interval_s: self.goodput(interval_s, storage_s), low, storage_s)

    def _best_storage(self, memory_s: float, low: float) -> float:
        return _argmax(lambda interval_s: self.goodput(memory_s, interval_s), low, INTERVAL_S_MAX)


def _argmax(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one maximum has it, on a logarithmic scale; `low` if there is no room above."""
    left, right = math.log(max(low, 1e-6)), math.log(max(high, low, 1e-6))
    for _ in range(60):
        inner, outer = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        if function(math.exp(inner)) >= function(math.exp(outer)):
            right = outer
        else:
            left = inner
    return max(low, math.exp((left + right) / 2))
