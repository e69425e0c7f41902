"""What flushing to the shared tier counts, beside the daemon's other metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge


class TierMetrics:
    """One per node, in the registry of its `Metrics`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"snapd_flush_{name}", text, registry=registry)

        self.snapshots = counter("snapshots", "Snapshots of which this node's part is in the shared tier.")
        self.committed = counter("committed", "Of these, committed by this node.")
        self.overtaken = counter("overtaken", "Snapshots that were given up for a newer one.")
        self.raw_bytes = counter(
            "raw_bytes", "Bytes of chunks that were written to the shared tier, as in memory."
        )
        self.stored_bytes = counter("stored_bytes", "The same as they are stored.")
        self.reused_bytes = counter("reused_bytes", "Bytes of chunks that the shared tier had already.")
        self.seconds = counter("seconds", "From the beginning of a flush until the snapshot was durable.")
        self.failures = Counter(
            "snapd_flush_failures", "Attempts that failed, by the kind of error.", ["kind"], registry=registry
        )
        self.requests = Counter(
            "snapd_tier_requests", "Requests to the shared tier's store.", ["request"], registry=registry
        )
        self.retries = Counter("snapd_tier_retries", "Requests that were repeated.", registry=registry)
        self.sent_bytes = Counter("snapd_tier_sent_bytes", "Sent to the store.", registry=registry)
        self.received_bytes = Counter(
            "snapd_tier_received_bytes", "Received from the store.", registry=registry
        )
        self.paused = Gauge(
            "snapd_flush_paused", "1 while nothing of the job becomes durable.", ["job"], registry=registry
        )
        self.behind_seconds = Gauge(
            "snapd_flush_behind_seconds",
            "Since the newest durable snapshot was captured; since the start before there is one.",
            ["job"],
            registry=registry,
        )
        self._told: dict[str, int] = {}

    def tell_requests(
        self, count: Mapping[str, int], *, sent_nbytes: int, received_nbytes: int, retries: int
    ) -> None:
        """Take over what a store has counted since it was opened."""
        for request, total in count.items():
            self.requests.labels(request).inc(self._since(request, total))
        self.sent_bytes.inc(self._since(".sent", sent_nbytes))
        self.received_bytes.inc(self._since(".received", received_nbytes))
        self.retries.inc(self._since(".retries", retries))

    def _since(self, name: str, total: int) -> int:
        """0 or more: a store that was opened anew counts from 0."""
        before = self._told.get(name, 0)
        self._told[name] = total
        return total - before if total >= before else total
