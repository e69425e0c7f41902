"""The cluster in `snapd status`: nodes, groups, and what is protected."""

from __future__ import annotations

from rich.console import RenderableType
from snapd_proto import admin_pb2

from snapd.cli.output import facts, format_age, table
from snapd.units import format_size

NODE_HEADINGS = (
    "NODE",
    "STATE",
    "DOMAIN",
    "GROUP",
    "ARENA",
    "PARITY",
    "SENT",
    "RECEIVED",
    "VERSION",
    "TROUBLE",
)
JOB_HEADINGS = ("JOB", "COMPLETE", "PROTECTED", "BEING PROTECTED", "PARITY", "COLLECTOR", "WHY")
RIGHT = ("GROUP", "ARENA", "PARITY", "SENT", "RECEIVED")


def cluster_parts(reply: admin_pb2.StatusReply) -> list[RenderableType]:
    """What `snapd status` prints of the cluster; nothing on a machine alone."""
    if not reply.HasField("cluster"):
        return []
    cluster = reply.cluster
    parts: list[RenderableType] = ["", facts(_facts(cluster))]
    rows = [_node_row(row, cluster) for row in cluster.nodes]
    parts += ["", table(NODE_HEADINGS, rows, right=RIGHT)]
    jobs = [_job_row(job) for job in reply.jobs if job.is_clustered]
    if jobs:
        parts += ["", table(JOB_HEADINGS, jobs, right=RIGHT)]
    return parts


def _facts(cluster: admin_pb2.ClusterStatus) -> dict[str, str]:
    codes = sorted({group.code for group in cluster.groups})
    groups = f"{len(cluster.groups)} group" + ("s" if len(cluster.groups) != 1 else "")
    away = f"away for {format_age(cluster.away_s)}: {cluster.away_reason}" if cluster.is_away else "answers"
    return {
        "cluster": f"{cluster.cluster_id or 'not joined yet'}, epoch {cluster.epoch}, node {cluster.node}",
        "coordinator": f"{'this daemon, ' if cluster.is_leader else ''}{away}",
        "not believed": cluster.distrust,
        "protection": f"asked {cluster.asked_code}, {groups} with {', '.join(codes) or 'none'}",
        "DEGRADED": cluster.degraded,
        "groups": cluster.reason,
    }


def _node_row(row: admin_pb2.NodeRow, cluster: admin_pb2.ClusterStatus) -> tuple[str, ...]:
    state = row.state + (f" {format_age(row.absent_s)}" if row.state in ("absent", "lost") else "")
    sizes = (row.arena_bytes, row.parity_bytes, row.sent_bytes, row.received_bytes)
    return (
        row.node + ("*" if row.node == cluster.node else ""),
        state,
        row.domain,
        str(row.group) if row.group >= 0 else "none",
        *(format_size(size) if row.answered else "" for size in sizes),
        row.version,
        row.trouble,
    )


def _job_row(job: admin_pb2.JobStatus) -> tuple[str, ...]:
    return (
        job.job,
        _snapshot(job.has_complete, job.complete_generation, job.complete_step),
        _snapshot(job.has_protected, job.protected_generation, job.protected_step),
        _snapshot(job.has_target, job.target_generation, job.target_step),
        format_size(job.parity_bytes),
        job.collector,
        job.protection,
    )


def _snapshot(is_there: bool, generation: int, step: int) -> str:
    return f"step {step} (generation {generation})" if is_there else "none"


def cluster_json(cluster: admin_pb2.ClusterStatus) -> dict[str, object]:
    """The cluster part of the JSON; sizes in bytes, durations in seconds."""
    return {
        "node": cluster.node,
        "cluster_id": cluster.cluster_id,
        "epoch": cluster.epoch,
        "is_leader": cluster.is_leader,
        "is_away": cluster.is_away,
        "away_s": cluster.away_s,
        "away_reason": cluster.away_reason or None,
        "distrust": cluster.distrust or None,
        "asked_code": cluster.asked_code,
        "degraded": cluster.degraded or None,
        "reason": cluster.reason,
        "groups": [
            {"number": group.number, "nodes": list(group.nodes), "code": group.code}
            for group in cluster.groups
        ],
        "nodes": [_node_json(row) for row in cluster.nodes],
    }


def _node_json(row: admin_pb2.NodeRow) -> dict[str, object]:
    known: dict[str, object] = {
        "node": row.node,
        "state": row.state,
        "domain": row.domain,
        "host": row.host,
        "address": row.address,
        "version": row.version,
        "group": row.group if row.group >= 0 else None,
        "absent_s": row.absent_s,
        "answered": row.answered,
        "trouble": row.trouble or None,
    }
    if row.answered:
        for name in ("arena_bytes", "parity_bytes", "sent_bytes", "received_bytes", "exposure_byte_s"):
            known[name] = getattr(row, name)
    return known


def protection_json(job: admin_pb2.JobStatus) -> dict[str, object]:
    """What a job's JSON says of its protection."""

    def snapshot(is_there: bool, generation: int, step: int) -> dict[str, int] | None:
        return {"generation": generation, "step": step} if is_there else None

    return {
        "protected": snapshot(job.has_protected, job.protected_generation, job.protected_step),
        "target": snapshot(job.has_target, job.target_generation, job.target_step),
        "protection": job.protection,
        "collector": job.collector or None,
        "parity_bytes": job.parity_bytes,
    }
