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
        bool, typer.Option("--force", help="Also when trainers are attached; they can save no more.")
    ] = False,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Remove a job: its snapshots are gone, its memory is free."""
    with connected(runtime_dir) as client:
        reply = client.remove_job(job, force=force)
    if as_json:
        print_json(
            {
                "job": job,
                "snapshots_removed": reply.snapshots_removed,
                "arena_bytes_freed": reply.arena_bytes_freed,
            }
        )
    else:
        freed = format_size(reply.arena_bytes_freed)
        count = reply.snapshots_removed
        what = f"{count} snapshot{'' if count == 1 else 's'}"
        print(f"{job}: {what} removed, {freed} given back")
    return ExitCode.DONE
