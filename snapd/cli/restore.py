"""`snapd restore`: a snapshot into the arena, from where the trainer takes it; `--to DIR`: as files that can be read
without snapd.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snapd.cli.exporting import Wanted, write_from_daemon, write_from_tier, written_json, written_line
from snapd.cli.filling import fill_arena
from snapd.cli.options import GenerationOption, JsonOption, RuntimeDirOption, StepOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json
from snapd.cli.tier_source import FromOption
from snapd.export.directory import check_target

RankOption = Annotated[
    list[int] | None,
    typer.Option("--rank", min=0, help="Only this rank; may be repeated. Default: all.", show_default=False),
]
JobOption = Annotated[
    str | None,
    typer.Option("--job", help="The job. Default: SNAPD_JOB, else the only one.", show_default=False),
]


def restore(
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="The directory to write; it must not exist yet, or be empty. Without it the daemon's arena is filled"
            " from its shared tier, so that the trainer then restores from memory.",
            show_default=False,
        ),
    ] = None,
    job: JobOption = None,
    step: StepOption = None,
    generation: GenerationOption = None,
    rank: RankOption = None,
    from_url: FromOption = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Write a snapshot (the newest complete one) as safetensors and JSON, or bring it into the arena; verified."""
    if to is None:
        return fill_arena(
            job,
            step=step,
            generation=generation,
            ranks=rank or [],
            url=from_url,
            runtime_dir=runtime_dir,
            as_json=as_json,
        )
    target = Path(to).absolute()
    check_target(target)
    wanted = Wanted(job, step, generation, rank or [])
    if from_url is None:
        written = write_from_daemon(target, wanted, runtime_dir, show_progress=not as_json)
    else:
        written = write_from_tier(target, wanted, from_url, show_progress=not as_json)
    if as_json:
        print_json(written_json(written))
    else:
        print(written_line(target, written))
    return ExitCode.DONE
