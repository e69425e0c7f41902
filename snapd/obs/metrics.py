"""What the daemon counts. Names carry their unit; served only when configured."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_WINDOW_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """One registry per daemon, nothing global."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.shards_captured = Counter("snapd_shards_captured", "Shards recorded.", registry=registry)
        self.snapshots_completed = Counter(
            "snapd_snapshots_completed", "Complete on all ranks.", registry=registry
        )
        self.snapshots_dropped = Counter(
            "snapd_snapshots_dropped", "Dropped, for any reason.", registry=registry
        )
        self.steps_skipped = Counter(
            "snapd_steps_skipped", "Skipped for want of a free slot.", registry=registry
        )
        self.lanes_discarded = Counter(
            "snapd_lanes_discarded", "Given up by the trainer.", ["reason"], registry=registry
        )
        self.lanes_refused = Counter("snapd_lanes_refused", "Refused by the daemon.", registry=registry)
        self.bytes_hashed = Counter("snapd_hashed_bytes", "Bytes hashed.", registry=registry)
        self.chunks_shared = Counter(
            "snapd_chunks_shared", "Chunks equal to the snapshot before.", registry=registry
        )
        self.chunks_bad = Counter("snapd_chunks_bad", "Chunks whose hash differed.", registry=registry)
        self.replica_differences = Counter(
            "snapd_replica_differences",
            "Replicas of a node that were found not to be equal.",
            registry=registry,
        )
        self.handshakes_refused = Counter(
            "snapd_handshakes_refused", "Connections refused.", registry=registry
        )
        self.arena_bytes = Gauge("snapd_arena_bytes", "Backed bytes of all segments.", registry=registry)
        self.sessions = Gauge(
            "snapd_sessions", "Sessions whose trainer is not known dead.", registry=registry
        )
        self.window_seconds = Histogram(
            "snapd_window_seconds",
            "From the hand-over to captured.",
            buckets=_WINDOW_BUCKETS_S,
            registry=registry,
        )
        self.hash_seconds = Histogram(
            "snapd_hash_seconds", "Hashing of one shard.", buckets=_WINDOW_BUCKETS_S, registry=registry
        )

    def serve(self, address: str, port: int) -> None:
        """Serve the registry over HTTP; only when configured."""
        start_http_server(port, addr=address, registry=self.registry)
