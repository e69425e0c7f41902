"""Who is not to be asked for a while, because he failed: longer each time, until he succeeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

FIRST_S = 0.1
LONGEST_S = 10.0


@dataclass(slots=True)
class PeerBackoff:
    """On the loop. "" names ourselves. A peer that failed is tried by one batch at a time until it succeeds."""

    now_s: Callable[[], float]
    _failures: dict[str, int] = field(default_factory=dict)
    _not_before_s: dict[str, float] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)

    def failed(self, peer: str, reason: str) -> None:
        """Count one more failure in a row."""
        count = self._failures.get(peer, 0)
        self._failures[peer] = count + 1
        self._not_before_s[peer] = self.now_s() + min(LONGEST_S, FIRST_S * 2.0 ** min(count, 16))
        self.troubles[peer] = reason

    def succeeded(self, peer: str) -> None:
        self._failures.pop(peer, None)
        self._not_before_s.pop(peer, None)
        self.troubles.pop(peer, None)

    def is_doubtful(self, peer: str) -> bool:
        return peer in self._failures

    def wait_s(self, peers: Iterable[str]) -> float:
        """How long until all of them may be asked; 0: now."""
        now = self.now_s()
        return max([0.0, *(self._not_before_s.get(peer, now) - now for peer in peers)])

    def next_s(self) -> float | None:
        """How long until somebody may be asked again who may not now; None: there is nobody."""
        now = self.now_s()
        waits = [until - now for until in self._not_before_s.values() if until > now]
        return min(waits, default=None)

    @property
    def trouble(self) -> str:
        """All that is wrong, in words; empty if nothing is."""
        return "; ".join(
            f"{peer}: {reason}" if peer else reason for peer, reason in sorted(self.troubles.items())
        )
