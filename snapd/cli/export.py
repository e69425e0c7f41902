"""`snapd export`: a snapshot for other programs: safetensors, torch.distributed.checkpoint, or one torch file."""

from __future__ import annotations

import enum
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from snapd.cli.exporting import (
    Wanted,
    Written,
    check_room,
    write_from_daemon,
    write_from_tier,
    written_json,
    written_line,
)
from snapd.cli.options import GenerationOption, JsonOption, RuntimeDirOption, StepOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json
from snapd.cli.restore import JobOption
from snapd.cli.tier_source import FromOption
from snapd.errors import ConfigError, NotRestorable
from snapd.export.directory import check_target, working_folder

CLIENT_UNUSABLE = 3


class Format(enum.StrEnum):
    SAFETENSORS = "safetensors"
    DCP = "dcp"
    TORCH = "torch"


def export(
    to: Annotated[
        Path, typer.Option("--to", help="The directory to write; it must not exist yet, or be empty.")
    ],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="safetensors: a file per rank. dcp: a checkpoint of torch.distributed.checkpoint, for any number of"
            " ranks. torch: one file for torch.load. The last two need torch, and for a while twice the room.",
        ),
    ] = Format.SAFETENSORS,
    job: JobOption = None,
    step: StepOption = None,
    generation: GenerationOption = None,
    from_url: FromOption = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Write a snapshot (the newest complete one) for other programs, every chunk verified."""
    target = Path(to).absolute()
    check_target(target)
    wanted = Wanted(job, step, generation, [])

    def write(where: Path) -> Written:
        if from_url is None:
            return write_from_daemon(where, wanted, runtime_dir, show_progress=not as_json)
        return write_from_tier(where, wanted, from_url, show_progress=not as_json)

    written = write(target) if form is Format.SAFETENSORS else _convert(target, form, write)
    if as_json:
        files = {} if form is Format.SAFETENSORS else {"files": sorted(p.name for p in target.iterdir())}
        print_json({**written_json(written), "directory": str(target), "format": form.value, **files})
    else:
        print(f"{written_line(target, written)}, as {form.value}")
    return ExitCode.DONE


def _convert(target: Path, form: Format, write: Callable[[Path], Written]) -> Written:
    """By way of safetensors beside the target; the target appears complete or not at all."""
    with working_folder(target, form.value) as folder:
        between, working = folder / "safetensors", folder / form.value
        written = write(between)
        check_room(target, written.export.nbytes)
        command = [sys.executable, "-m", "snapd_client.export", form.value, str(between), str(working)]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            raise _failed(form, result.returncode, result.stderr)
        check_target(target)  # somebody else may have been quicker
        working.rename(target)
    return written


def _failed(form: Format, code: int, told: str) -> ConfigError | NotRestorable:
    last = told.strip().splitlines()[-1] if told.strip() else f"it ended with {code}"
    if code == CLIENT_UNUSABLE:
        return NotRestorable(
            f"cannot be exported as {form.value}: {last.removeprefix('snapd: ')}", kind="export"
        )
    if "No module named" in last:
        return ConfigError(
            f"export to {form.value} needs torch and snapd's client in {sys.executable}: {last}",
            kind="export",
            hint="pip install snapd[torch], or export as safetensors",
        )
    return ConfigError(f"the export to {form.value} failed: {last}", kind="export")
