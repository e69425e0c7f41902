"""`snapd restore --to DIR`: write a snapshot as files that can be read without snapd."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from snapd_proto import admin_pb2

from snapd.cli.connect import choose_job, connected
from snapd.cli.options import GenerationOption, JsonOption, RuntimeDirOption, StepOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json, progress_bar
from snapd.cli.shards import open_snapshot
from snapd.errors import CapacityError, ConfigError, IntegrityError, NotFoundError, UnavailableError
from snapd.export.directory import Export, check_target, export_nbytes, write_directory
from snapd.export.shard_view import ShardView
from snapd.rpc.local_client import LocalClient
from snapd.units import MIB, format_size

_FREE_BYTES_SPARE = 64 * MIB  # for the JSON beside the tensors


def restore(
    to: Annotated[
        Path, typer.Option("--to", help="The directory to write; it must not exist yet, or be empty.")
    ],
    job: Annotated[
        str | None,
        typer.Option("--job", help="The job. Default: SNAPD_JOB, else the only one.", show_default=False),
    ] = None,
    step: StepOption = None,
    generation: GenerationOption = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            "--rank", min=0, help="Only this rank; may be repeated. Default: all.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    runtime_dir: RuntimeDirOption = None,
) -> ExitCode:
    """Write a snapshot (the newest complete one) as safetensors and JSON, every chunk verified."""
    target = Path(to).absolute()
    check_target(target)
    with connected(runtime_dir) as client:
        name = choose_job(client, job)
        reply, views = open_snapshot(client, name, step=step, generation=generation, ranks=rank or [])
        ranks = sorted(set(rank or range(reply.summary.world_size)))
        try:
            export = _write(target, views, ranks, show_progress=not as_json)
        except IntegrityError as error:
            _check_still_there(client, reply.summary, error)
            raise
    if as_json:
        print_json(export_json(reply.summary, ranks, export))
    else:
        summary = reply.summary
        what = f"step {summary.step} (generation {summary.generation}) of {name}"
        count = f"{export.tensor_count} tensors, {format_size(export.nbytes)}"
        print(f"{target}: {what}, {len(ranks)} of {summary.world_size} ranks, {count}")
    return ExitCode.DONE


def _write(target: Path, views: dict[int, ShardView], ranks: list[int], *, show_progress: bool) -> Export:
    needed = export_nbytes(views, ranks)
    free = shutil.disk_usage(target.parent).free
    if needed + _FREE_BYTES_SPARE > free:
        what = f"{target} needs {format_size(needed)}, {target.parent} has {format_size(free)} free"
        raise CapacityError(what, hint="name another directory, or export fewer ranks with --rank")
    with progress_bar(is_wanted=show_progress) as bar:
        task = bar.add_task(f"writing {target.name}", total=needed)
        try:
            return write_directory(target, views, ranks, progress=lambda nbytes: bar.advance(task, nbytes))
        except OSError as error:
            what = f"{target} could not be written: {error.strerror or error}"
            raise ConfigError(what, hint="nothing was left behind; name another directory") from error


def _check_still_there(
    client: LocalClient, summary: admin_pb2.SnapshotSummary, error: IntegrityError
) -> None:
    """Bytes that changed because the snapshot was given up while we read are not bad bytes.

    Raises:
        UnavailableError: the snapshot is gone.
    """
    try:
        client.get_snapshot(summary.job, step=summary.step, generation=summary.generation)
    except NotFoundError:
        what = f"step {summary.step} of {summary.job} was given up while it was read"
        raise UnavailableError(what, hint="it was removed, or reading took too long; try again") from error


def export_json(summary: admin_pb2.SnapshotSummary, ranks: list[int], export: Export) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "directory": str(export.directory),
        "job": summary.job,
        "generation": summary.generation,
        "step": summary.step,
        "world_size": summary.world_size,
        "ranks": ranks,
        "tensor_count": export.tensor_count,
        "nbytes": export.nbytes,
        "files": [{"name": f.name, "nbytes": f.nbytes, "xxh3_128": f.xxh3_128} for f in export.files],
    }
