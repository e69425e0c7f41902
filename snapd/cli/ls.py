"""`snapd ls`: the snapshots that there are."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from snapd_proto import admin_pb2

from snapd.cli.connect import connected
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import format_moment, format_ranks, print_json, print_parts, table
from snapd.cli.tier_source import FromOption, opened_tier, snapshots_in
from snapd.errors import NotFoundError
from snapd.units import format_size

HEADINGS = (
    "JOB", "GEN", "STEP", "STATE", "RANKS", "HERE", "SIZE", "SHARED", "CAPTURED", "PARENT", "VERIFIED",
    "PROBLEM",
)  # fmt: skip
RIGHT = ("GEN", "STEP", "RANKS", "SIZE", "SHARED")


def ls(
    job: Annotated[str, typer.Argument(help="Only this job.", show_default=False)] = "",
    from_url: FromOption = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """List the snapshots, newest first."""
    if from_url is None:
        with connected(runtime_dir) as client:
            snapshots = client.list_snapshots(job)
    else:
        with opened_tier(from_url) as source:
            snapshots = snapshots_in(source, job)
    snapshots = sorted(snapshots, key=lambda s: (s.job, -s.generation, -s.step))
    if as_json:
        print_json([summary_json(snapshot) for snapshot in snapshots])
    elif not snapshots:
        of_job, where = f" of job {job!r}" if job else "", f"in {from_url}" if from_url else "here"
        hint = "" if from_url else "snapd status shows who is attached"
        raise NotFoundError(f"no snapshots{of_job} {where}", hint=hint)
    else:
        now_s = time.time()
        print_parts(table(HEADINGS, [summary_row(snapshot, now_s) for snapshot in snapshots], right=RIGHT))
    if not snapshots:
        return ExitCode.FOUND_NOTHING
    is_stored_and_bad = from_url is not None and all(snapshot.problem for snapshot in snapshots)
    return ExitCode.UNUSABLE if is_stored_and_bad else ExitCode.DONE


def summary_row(summary: admin_pb2.SnapshotSummary, now_s: float) -> tuple[str, ...]:
    """A row under HEADINGS."""
    parent = f"{summary.parent_generation}/{summary.parent_step}" if summary.has_parent else ""
    return (
        summary.job,
        str(summary.generation),
        str(summary.step),
        format_state(summary),
        str(summary.world_size),
        format_ranks(summary.ranks_captured) if summary.is_clustered else "",
        format_size(summary.nbytes),
        format_size(summary.nbytes_shared) if summary.nbytes_shared else "",
        format_moment(summary.captured_wall_time_s, now_s),
        parent,
        "yes" if is_verified(summary) else "",
        summary.problem,
    )


def is_verified(summary: admin_pb2.SnapshotSummary) -> bool:
    """Whether every chunk was hashed again, and was what it should be."""
    return summary.verified and not summary.problem


def format_state(summary: admin_pb2.SnapshotSummary) -> str:
    """Whether all ranks have it: "complete", or which ranks do; in a cluster also whether it is protected; "durable"
    once it is in the shared tier; "unusable" once it is proved bad.
    """
    if summary.problem:
        return "unusable"
    if summary.is_clustered or summary.level == "durable":
        return summary.level
    if summary.complete:
        return "complete"
    return f"only ranks {format_ranks(summary.ranks_captured)}"


def summary_json(summary: admin_pb2.SnapshotSummary) -> dict[str, object]:
    """One snapshot of the JSON; sizes in bytes, moments in seconds since 1970."""
    parent = (
        {"generation": summary.parent_generation, "step": summary.parent_step} if summary.has_parent else None
    )
    return {
        "job": summary.job,
        "generation": summary.generation,
        "step": summary.step,
        "complete": summary.complete,
        "world_size": summary.world_size,
        "ranks_captured": list(summary.ranks_captured),
        "level": summary.level or None,
        "nbytes": summary.nbytes,
        "nbytes_shared": summary.nbytes_shared,
        "captured_wall_time_s": summary.captured_wall_time_s,
        "parent": parent,
        "verified": is_verified(summary),
        "problem": summary.problem or None,
    }
