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
from snapd.errors import NotFoundError
from snapd.units import format_size

HEADINGS = (
    "JOB", "GEN", "STEP", "STATE", "RANKS", "HERE", "SIZE", "SHARED", "CAPTURED", "PARENT", "VERIFIED",
    "PROBLEM",
)  # fmt: skip
RIGHT = ("GEN", "STEP", "RANKS", "SIZE", "SHARED")


def ls(
    job: Annotated[str, typer.Argument(help="Only this job.", show_default=False)] = "",
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """List the snapshots, newest first."""
    with connected(runtime_dir) as client:
        snapshots = sorted(client.list_snapshots(job), key=lambda s: (s.job, -s.generation, -s.step))
    if as_json:
        print_json([summary_json(snapshot) for snapshot in snapshots])
        return ExitCode.DONE if snapshots else ExitCode.FOUND_NOTHING
    if not snapshots:
        of_job = f" of job {job!r}" if job else ""
        raise NotFoundError(f"no snapshots{of_job} here", hint="snapd status shows who is attached")
    now_s = time.time()
    rows = [summary_row(snapshot, now_s) for snapshot in snapshots]
    print_parts(table(HEADINGS, rows, right=RIGHT))
    return ExitCode.DONE


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
    """Whether all ranks have it: "complete", or which ranks do; in a cluster also whether it is protected; "unusable"
    once it is proved bad.
    """
    if summary.problem:
        return "unusable"
    if summary.is_clustered:
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
