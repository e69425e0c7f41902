"""`snapd rm`: drop a job's snapshots and give its memory back."""

from __future__ import annotations

from typing import Annotated

import typer

from snapd.cli.connect import connected
from snapd.cli.options import JsonOption, RuntimeDirOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json
from snapd.units import format_size


def rm(
    job: Annotated[str, typer.Argument(help="The job.")],
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also when trainers are attached (they save no more) or a node is absent."
        ),
    ] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Remove a job, on all nodes: its snapshots are gone, its memory is free."""
    with connected(runtime_dir) as client:
        reply = client.remove_job(job, force=force)
    if as_json:
        print_json(
            {
                "job": job,
                "snapshots_removed": reply.snapshots_removed,
                "arena_bytes_freed": reply.arena_bytes_freed,
                "nodes": list(reply.nodes),
                "late_nodes": list(reply.late_nodes),
                "absent_nodes": list(reply.absent_nodes),
                "reasons": dict(reply.reasons),
                "disk_waits": reply.disk_waits or None,
            }
        )
    else:
        freed = format_size(reply.arena_bytes_freed)
        count = reply.snapshots_removed
        what = f"{count} snapshot{'' if count == 1 else 's'}"
        where = f" on {', '.join(reply.nodes)}" if reply.nodes else ""
        print(f"{job}: {what} removed{where}, {freed} given back")
        if reply.late_nodes:
            print(f"  not done yet: {', '.join(reply.late_nodes)}")
        absent = [node for node in reply.absent_nodes if node not in reply.reasons]
        if absent:
            print(f"  absent, and will drop what they have of it: {', '.join(absent)}")
        for node, why in sorted(reply.reasons.items()):
            print(f"  {node} will drop what it has of it once it can: {why}")
        if reply.disk_waits:
            print(f"  not gone from this node's disk yet: {reply.disk_waits}")
            print(
                "  it goes when the disk is there again, if this daemon still runs then; else give the command again"
            )
    return ExitCode.DONE
