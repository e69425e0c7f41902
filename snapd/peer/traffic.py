"""Bytes sent to and received from each peer, frames included; TLS and TCP come on top."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """Totals of one peer since the start."""

    sent_bytes: int = 0
    received_bytes: int = 0


class TrafficMeter:
    """Counts for all links and the server of a node. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_node: dict[str, Traffic] = {}

    def add(self, node: str, sent_bytes: int, received_bytes: int) -> None:
        with self._lock:
            old = self._by_node.get(node, Traffic())
            self._by_node[node] = Traffic(old.sent_bytes + sent_bytes, old.received_bytes + received_bytes)

    def by_node(self) -> dict[str, Traffic]:
        with self._lock:
            return dict(self._by_node)

    def total(self) -> Traffic:
        parts = self.by_node().values()
        return Traffic(sum(t.sent_bytes for t in parts), sum(t.received_bytes for t in parts))
