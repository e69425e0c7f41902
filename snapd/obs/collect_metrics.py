"""What collecting garbage in the shared tier counts, beside the daemon's other metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class CollectMetrics:
    """One per node, in the registry of its `Metrics`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"snapd_collect_{name}", text, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"snapd_collect_{name}", text, ["job"], registry=registry)

        self.passes = counter("passes", "Looks at a job's part of the shared tier that ended well.")
        self.condemned = counter("condemned", "Objects that were condemned.")
        self.deleted = counter("deleted", "Objects that were deleted.")
        self.deleted_bytes = counter("deleted_bytes", "Bytes of packs and manifests that were deleted.")
        self.aborted = counter("aborted", "Unfinished uploads of dead writers that were aborted.")
        self.rewritten_bytes = counter("rewritten_bytes", "Bytes of packs written in place of emptier ones.")
        self.requests = counter("requests", "Requests to the store during passes.")
        self.failures = Counter(
            "snapd_collect_failures", "Passes that failed, by the kind of error.", ["kind"], registry=registry
        )
        self.stored_bytes = gauge("stored_bytes", "Bytes of all packs at the last look.")
        self.named_bytes = gauge("named_bytes", "Bytes of the packs that a snapshot or a writer names.")
        self.snapshots = gauge("snapshots", "Durable snapshots at the last look.")
