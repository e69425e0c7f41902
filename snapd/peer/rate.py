"""A token bucket for traffic that must leave room for the training: pure core, and what threads wait on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from snapd.errors import LocalProtocolError
from snapd.peer.deadline import Deadline


class TokenBucket:
    """Bytes per second with a burst; time is passed in. Not thread-safe.

    A transfer may begin while there is credit at all and is charged in full, so that one larger than the burst passes
    too: over any time t at most `rate * t + burst + one transfer` bytes begin.
    """

    def __init__(self, rate_bytes_per_s: float | None, burst_bytes: int, now_s: float) -> None:
        """`rate_bytes_per_s`: None for no limit."""
        _check_rate(rate_bytes_per_s, burst_bytes)
        self._rate, self._burst = rate_bytes_per_s, burst_bytes
        self._now_s = now_s
        self._credit = float(burst_bytes)

    def set_rate(self, rate_bytes_per_s: float | None, burst_bytes: int, now_s: float) -> None:
        """From now on; debt is kept."""
        _check_rate(rate_bytes_per_s, burst_bytes)
        self._refill(now_s)
        self._rate, self._burst = rate_bytes_per_s, burst_bytes
        self._credit = min(self._credit, float(burst_bytes))

    def take(self, nbytes: int, now_s: float) -> float:
        """0 if the transfer may begin now and is charged; else the seconds to wait before asking again."""
        if self._rate is None:
            return 0.0
        self._refill(now_s)
        if self._credit > 0:
            self._credit -= nbytes
            return 0.0
        return max(1e-4, (1.0 - self._credit) / self._rate)

    def _refill(self, now_s: float) -> None:
        if self._rate is not None:
            grown = self._credit + max(0.0, now_s - self._now_s) * self._rate
            self._credit = min(float(self._burst), grown)
        self._now_s = max(self._now_s, now_s)


def _check_rate(rate_bytes_per_s: float | None, burst_bytes: int) -> None:
    if (rate_bytes_per_s is not None and rate_bytes_per_s <= 0) or burst_bytes <= 0:
        raise LocalProtocolError("a rate and its burst are above 0", rate=rate_bytes_per_s, burst=burst_bytes)


class Pacer:
    """A bucket that several threads share; the rate can be changed while they wait."""

    def __init__(
        self, clock: Callable[[], float], rate_bytes_per_s: float | None, burst_bytes: int = 16 << 20
    ) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._bucket = TokenBucket(rate_bytes_per_s, burst_bytes, clock())
        self._burst_bytes = burst_bytes

    def set_rate(self, rate_bytes_per_s: float | None, burst_bytes: int | None = None) -> None:
        """Takes effect at once, for those who wait too."""
        with self._changed:
            self._burst_bytes = burst_bytes or self._burst_bytes
            self._bucket.set_rate(rate_bytes_per_s, self._burst_bytes, self._clock())
            self._changed.notify_all()

    def try_take(self, nbytes: int) -> bool:
        """Whether a transfer of `nbytes` may begin now; if so it is charged."""
        with self._changed:
            return self._bucket.take(nbytes, self._clock()) == 0.0

    def wait_take(self, nbytes: int, deadline: Deadline) -> None:
        """Wait until it may begin. Raises TimeoutError."""
        with self._changed:
            while (wait_s := self._bucket.take(nbytes, self._clock())) > 0:
                self._changed.wait(min(wait_s, deadline.remaining_s()))
