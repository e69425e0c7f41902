"""Counters of one Snapshotter, for `snap.health()` and metrics."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

RECENT_MAX = 1024


@dataclass
class Health:
    """Plain counters; written by the training and control threads, each field by one of them."""

    committed: int = 0
    skipped: int = 0
    discarded: int = 0
    failures: int = 0
    layouts: int = 0
    last_committed_step: int | None = None
    last_error: str = ""
    last_discard: list[str] = field(default_factory=list)
    early_bytes: int = 0
    lazy_bytes: int = 0
    helped_bytes: int = 0
    is_fenced: bool = False
    handover_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))
    fence_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))
    window_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))

    def note_window(self, window_ns: int) -> None:
        """From the hand-over to the commit word, which is when the snapshot survives the trainer."""
        self.window_s.append(window_ns / 1e9)

    def summary(self) -> dict[str, object]:
        """What `snap.health()` returns; durations in seconds, the recent ones as lists."""
        return {
            "committed": self.committed,
            "skipped": self.skipped,
            "discarded": self.discarded,
            "failures": self.failures,
            "layouts": self.layouts,
            "last_committed_step": self.last_committed_step,
            "last_error": self.last_error,
            "last_discard": list(self.last_discard),
            "early_bytes": self.early_bytes,
            "lazy_bytes": self.lazy_bytes,
            "helped_bytes": self.helped_bytes,
            "is_fenced": self.is_fenced,
            "handover_s": list(self.handover_s),
            "fence_s": list(self.fence_s),
            "commit_window_s": list(self.window_s),
        }
