"""`snapd restore` without `--to`: a snapshot of the tier goes into the daemon's arena, before the trainer starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from snapd_proto import admin_pb2

from snapd.cli.connect import connected
from snapd.cli.outcome import ExitCode
from snapd.cli.output import format_ranks, print_json, progress_bar
from snapd.cli.tier_source import CONFIGURED
from snapd.errors import ConfigError
from snapd.units import format_size


def fill_arena(
    job: str | None,
    *,
    step: int | None,
    generation: int | None,
    ranks: Sequence[int],
    url: str | None,
    runtime_dir: Path | None,
    as_json: bool,
) -> ExitCode:
    """Have the daemon bring it; print what came of it.

    Raises:
        ConfigError: no job is named, or the daemon has no such tier. SnapdError: as the daemon says.
    """
    name = job or os.environ.get("SNAPD_JOB")
    if not name:
        raise ConfigError(
            "which job?", hint="name one with --job or SNAPD_JOB; snapd ls --from shared lists them"
        )
    request = admin_pb2.FillArenaRequest(
        job=name,
        has_step=step is not None,
        step=step or 0,
        has_generation=generation is not None,
        generation=generation or 0,
        ranks=ranks,
        url="" if url in (None, CONFIGURED) else url,
    )
    last = admin_pb2.FillArenaProgress()
    with connected(runtime_dir) as client, progress_bar(is_wanted=not as_json) as bar:
        task = bar.add_task(f"bringing {name}", total=None)
        for last in client.fill_arena(request):
            what = f"bringing {name} step {last.step}" if last.step else f"bringing {name}"
            bar.update(task, description=what, completed=last.nbytes_done, total=last.nbytes_total or None)
    for one in last.passed_over:
        what = f"snapd: generation {one.generation} step {one.step} cannot be used: {one.reason}"
        print(what, file=sys.stderr)
    if as_json:
        print_json(_json(name, last))
    else:
        print(_line(name, last))
    return ExitCode.DONE


def _line(job: str, last: admin_pb2.FillArenaProgress) -> str:
    what = f"{job}: step {last.step} (generation {last.generation})"
    if last.is_newer_here:
        return f"{what} is in the arena, and newer than what {last.tier} has"
    here = f", ranks {format_ranks(last.ranks_here)} were there already" if last.ranks_here else ""
    return f"{what} of {last.world_size} ranks is in the arena, {format_size(last.nbytes_total)} from {last.tier}{here}"


def _json(job: str, last: admin_pb2.FillArenaProgress) -> dict[str, object]:
    return {
        "job": job,
        "generation": last.generation,
        "step": last.step,
        "world_size": last.world_size,
        "nbytes": last.nbytes_total,
        "ranks_here": list(last.ranks_here),
        "is_newer_here": last.is_newer_here,
        "tier": last.tier,
        "passed_over": [
            {"generation": one.generation, "step": one.step, "reason": one.reason} for one in last.passed_over
        ],
    }
