"""What keeping snapshots on the node's own disk counts, beside the daemon's other metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class DiskMetrics:
    """One per node with a disk of its own, in the registry of its `Metrics`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"snapd_disk_{name}", text, registry=registry)

        self.snapshots = counter("snapshots", "Snapshots of which this node's part is on its disk.")
        self.overtaken = counter("overtaken", "Snapshots that were given up for a newer one.")
        self.raw_bytes = counter("raw_bytes", "Bytes of chunks that were written to the node's disk.")
        self.reused_bytes = counter("reused_bytes", "Bytes of chunks that the node's disk had already.")
        self.seconds = counter("seconds", "From the beginning of a write until the snapshot was on the disk.")
        self.brought = counter(
            "brought", "Snapshots that were brought back from the node's disk into memory."
        )
        self.damaged = counter("damaged", "Snapshots on the node's disk that turned out to be damaged.")
        self.repaired_shards = counter(
            "repaired_shards", "Shards that were bad in memory and came anew from the disk."
        )
        self.scrubbed_bytes = counter(
            "scrubbed_bytes", "Bytes on the node's disk that were read again and verified."
        )
        self.rotten_chunks = counter(
            "rotten_chunks", "Stored chunks and manifests on the node's disk that turned out to be bad."
        )
        self.mended_chunks = counter("mended_chunks", "Of these, those that were written again from memory.")
        self.rotten = Gauge(
            "snapd_disk_rotten",
            "Stored chunks and manifests on the node's disk that are bad, and not written again yet.",
            ["job"],
            registry=registry,
        )
        self.failures = Counter(
            "snapd_disk_failures", "Attempts that failed, by the kind of error.", ["kind"], registry=registry
        )
        self.paused = Gauge(
            "snapd_disk_paused",
            "1 while nothing of the job gets onto the node's disk.",
            ["job"],
            registry=registry,
        )
        self.behind_seconds = Gauge(
            "snapd_disk_behind_seconds",
            "Since the newest snapshot on the node's disk was captured; since the start before there is one.",
            ["job"],
            registry=registry,
        )
