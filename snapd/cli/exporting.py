"""Writing a snapshot as files, from a daemon or straight from a tier: what `restore --to` and `export` share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapd_proto import admin_pb2

from snapd.cli.connect import choose_job, connected
from snapd.cli.output import progress_bar
from snapd.cli.shards import open_snapshot
from snapd.cli.tier_shards import stored_views, usable_snapshots
from snapd.cli.tier_source import opened_tier, summary_of
from snapd.core.ids import SnapshotId
from snapd.errors import CapacityError, ConfigError, IntegrityError, NotFoundError, UnavailableError
from snapd.export.directory import Export, export_nbytes, write_directory
from snapd.export.shard_view import ShardView
from snapd.rpc.local_client import LocalClient
from snapd.tier.reading import Broken
from snapd.units import MIB, format_size

_FREE_BYTES_SPARE = 64 * MIB  # for the JSON beside the tensors


@dataclass(frozen=True)
class Wanted:
    """Which snapshot, of which ranks (empty: all)."""

    job: str | None
    step: int | None
    generation: int | None
    ranks: Sequence[int]


@dataclass(frozen=True)
class Written:
    """What was written, and what was found broken on the way to it."""

    summary: admin_pb2.SnapshotSummary
    ranks: list[int]
    export: Export
    broken: tuple[Broken, ...] = ()


def write_from_daemon(
    target: Path, wanted: Wanted, runtime_dir: Path | None, *, show_progress: bool
) -> Written:
    """Export what a daemon holds.

    Raises:
        SnapdError: as `connected` and `write_directory`; nothing is left behind.
    """
    with connected(runtime_dir) as client:
        name = choose_job(client, wanted.job)
        reply, views = open_snapshot(
            client, name, step=wanted.step, generation=wanted.generation, ranks=wanted.ranks
        )
        ranks = sorted(set(wanted.ranks or range(reply.summary.world_size)))
        try:
            export = _write(target, views, ranks, show_progress=show_progress)
        except IntegrityError as error:
            _check_still_there(client, reply.summary, error)
            raise
        return Written(reply.summary, ranks, export)


def write_from_tier(target: Path, wanted: Wanted, url: str, *, show_progress: bool) -> Written:
    """Export what a tier holds: the newest snapshot that fits and is good; what is bad is told on standard error.

    Raises:
        NotFoundError: nothing fits. NotRestorable: none of what fits is good. SnapdError: the store cannot be asked.
    """
    broken: list[Broken] = []
    with opened_tier(url) as source:
        reader = source.reader(source.choose_job(wanted.job or os.environ.get("SNAPD_JOB")))
        told = 0
        for opened in usable_snapshots(
            source, reader, step=wanted.step, generation=wanted.generation, broken=broken
        ):
            told = _tell(broken, told)
            try:
                with stored_views(reader, opened, wanted.ranks) as views:
                    ranks = sorted(set(wanted.ranks or range(opened.record.world_size)))
                    export = _write(target, views, ranks, show_progress=show_progress)
            except IntegrityError as error:
                if reader.was_deleted(opened.id):
                    raise _deleted(opened.id, reader.job) from error
                broken.append(Broken(opened.id, str(error)))
                told = _tell(broken, told)
                continue
            summary = summary_of(opened.record, [*opened.shards.values()])
            return Written(summary, ranks, export, tuple(broken))
    raise AssertionError("usable_snapshots ends with an error")


def _deleted(snapshot: SnapshotId, job: str) -> UnavailableError:
    """What could not be read is not damaged: retention dropped it meanwhile, and older ones before it."""
    hint = f"try again, or pin one first: snapd pin NAME --job {job} --step STEP, and snapd unpin NAME afterwards"
    return UnavailableError(f"{snapshot} of {job} was deleted while it was read", kind="deleted", hint=hint)


def _tell(broken: Sequence[Broken], told: int) -> int:
    for one in broken[told:]:
        print(f"snapd: generation/step {one.id} cannot be used: {one.reason}", file=sys.stderr)
    return len(broken)


def _write(target: Path, views: Mapping[int, ShardView], ranks: list[int], *, show_progress: bool) -> Export:
    needed = export_nbytes(views, ranks)
    check_room(target, needed)
    with progress_bar(is_wanted=show_progress) as bar:
        task = bar.add_task(f"writing {target.name}", total=needed)
        try:
            return write_directory(target, views, ranks, progress=lambda nbytes: bar.advance(task, nbytes))
        except OSError as error:
            what = f"{target} could not be written: {error.strerror or error}"
            raise ConfigError(what, hint="nothing was left behind; name another directory") from error


def check_room(target: Path, nbytes: int) -> None:
    """Raise CapacityError unless so much, and a little more, can be written to `target`."""
    free = shutil.disk_usage(target.parent).free
    if nbytes + _FREE_BYTES_SPARE > free:
        what = f"{target} needs {format_size(nbytes)}, {target.parent} has {format_size(free)} free"
        raise CapacityError(what, hint="name another directory, or export fewer ranks with --rank")


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


def written_line(target: Path, written: Written) -> str:
    """What is printed when it is done."""
    summary, export = written.summary, written.export
    what = f"step {summary.step} (generation {summary.generation}) of {summary.job}"
    count = f"{export.tensor_count} tensors, {format_size(export.nbytes)}"
    return f"{target}: {what}, {len(written.ranks)} of {summary.world_size} ranks, {count}"


def written_json(written: Written) -> dict[str, object]:
    """What `--json` prints."""
    summary, export = written.summary, written.export
    result: dict[str, object] = {
        "directory": str(export.directory),
        "job": summary.job,
        "generation": summary.generation,
        "step": summary.step,
        "world_size": summary.world_size,
        "ranks": written.ranks,
        "tensor_count": export.tensor_count,
        "nbytes": export.nbytes,
        "files": [{"name": f.name, "nbytes": f.nbytes, "xxh3_128": f.xxh3_128} for f in export.files],
    }
    if written.broken:
        result["passed_over"] = [
            {"generation": one.id.generation, "step": one.id.step, "reason": one.reason}
            for one in written.broken
        ]
    return result
