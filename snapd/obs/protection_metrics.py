"""What protection and recovery count, beside the daemon's other metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class ProtectionMetrics:
    """One per node, in the registry of its `Metrics`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"snapd_protect_{name}", text, registry=registry)

        self.pulled_bytes = counter("pulled_bytes", "Chunks received to be coded.")
        self.pushed_bytes = counter("pushed_bytes", "Parity fragments sent to peers.")
        self.encoded_bytes = counter("encoded_bytes", "Data bytes that went through the encoder.")
        self.rows_coded = counter("rows_coded", "Rows whose parity was computed here.")
        self.rows_shared = counter("rows_shared", "Rows whose parity was there already.")
        self.wrong_bytes = counter("wrong_bytes", "Chunks or fragments that arrived with another hash.")
        self.peer_failures = counter("peer_failures", "Transfers that a peer did not complete.")
        self.seconds = counter("seconds", "From a new target until this node's part was done.")
        self.targets_done = counter("targets_done", "Snapshots of which this node's part was done.")
        self.exposure_byte_s = counter(
            "exposure_byte_seconds", "Own bytes x time in which they were not protected."
        )
        self.recovered_bytes = Counter(
            "snapd_recovered_bytes", "Bytes of shards brought here.", ["how"], registry=registry
        )
        self.repaired_chunks = counter("repaired_chunks", "Bad chunks that were brought back from elsewhere.")
        self.repairs_failed = counter(
            "repairs_failed", "Shards with bad chunks that could not be had elsewhere."
        )
        self.parity_bytes = Gauge("snapd_parity_bytes", "Backed bytes of parity segments.", registry=registry)
