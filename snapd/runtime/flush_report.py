"""What a flush that ended well has done: for status, metrics and the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snapd.core.ids import SnapshotId
from snapd.obs.log import Field
from snapd.obs.tier_metrics import TierMetrics
from snapd.tier.flush import Flushed


@dataclass(frozen=True, slots=True)
class FlushReport:
    """The last flush that ended well. `requests`: to the store meanwhile, by kind (those of other jobs too)."""

    snapshot: SnapshotId
    nbytes: int
    raw_nbytes: int
    stored_nbytes: int
    reused_nbytes: int
    packs: int
    shards_resumed: int
    seconds: float
    requests: Mapping[str, int]

    @property
    def request_count(self) -> int:
        return sum(self.requests.values())

    @property
    def requests_per_gb(self) -> float:
        """For each 10^9 bytes of the node's part of the snapshot, whether they were written or there already."""
        total = self.raw_nbytes + self.reused_nbytes
        return self.request_count / (total / 1e9) if total else 0.0


def report_of(
    snapshot: SnapshotId,
    flushed: Flushed,
    before: Mapping[str, int],
    after: Mapping[str, int],
    seconds: float,
) -> FlushReport:
    """`before`, `after`: requests to the store so far, by kind."""
    counts = flushed.counts
    return FlushReport(
        snapshot=snapshot,
        nbytes=flushed.snapshot.nbytes,
        raw_nbytes=counts.raw_nbytes,
        stored_nbytes=counts.stored_nbytes,
        reused_nbytes=flushed.reused_nbytes,
        packs=counts.packs,
        shards_resumed=flushed.shards_resumed,
        seconds=seconds,
        requests={kind: n for kind, total in after.items() if (n := total - before.get(kind, 0)) > 0},
    )


def count_report(metrics: TierMetrics, report: FlushReport, *, is_ours: bool) -> None:
    metrics.snapshots.inc()
    metrics.committed.inc(int(is_ours))
    metrics.raw_bytes.inc(report.raw_nbytes)
    metrics.stored_bytes.inc(report.stored_nbytes)
    metrics.reused_bytes.inc(report.reused_nbytes)
    metrics.seconds.inc(max(0.0, report.seconds))


def log_fields(report: FlushReport) -> dict[str, Field]:
    return {
        "generation": report.snapshot.generation,
        "step": report.snapshot.step,
        "nbytes": report.nbytes,
        "written_nbytes": report.raw_nbytes,
        "stored_nbytes": report.stored_nbytes,
        "reused_nbytes": report.reused_nbytes,
        "shards_resumed": report.shards_resumed,
        "packs": report.packs,
        "requests": report.request_count,
        "requests_per_gb": round(report.requests_per_gb, 1),
        "seconds": round(report.seconds, 3),
    }
