"""Reading a tier from the command line, with no daemon: `--from URL`."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from snapd_proto import admin_pb2

from snapd.cli.settings import load_settings
from snapd.config_tiers import read_threads, store_of
from snapd.core.ids import checked_job_name
from snapd.core.stored import StoredShard, StoredSnapshot
from snapd.errors import ConfigError, NotFoundError, NotRestorable, SnapdError, UnavailableError
from snapd.store.base import Store
from snapd.store.node_folder import is_node_folder
from snapd.store.opening import FILE, parsed_url
from snapd.store.surroundings import Surroundings
from snapd.tier.reading import Broken, Candidate, Opened, TierReader, jobs_of
from snapd.tier.streaming import ReadPool

CONFIGURED = "shared"  # --from shared: the tier that the settings name
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="URL",
        help="Read a tier directly, no daemon needed: s3://BUCKET/PREFIX, a directory, or 'shared' for the"
        " configured one. Endpoint, CA and the like come from the settings of [tier].",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class TierSource:
    """An open tier."""

    store: Store
    pool: ReadPool

    def reader(self, job: str) -> TierReader:
        return TierReader(self.store, job, self.pool)

    def jobs(self) -> list[str]:
        return jobs_of(self.store)

    def choose_job(self, named: str | None) -> str:
        """The job that is meant: the one named, else the only one that there is.

        Raises:
            NotFoundError: there is none. ConfigError: there are several, or the name is none.
        """
        if named:
            return checked_job_name(named)
        jobs = self.jobs()
        if not jobs:
            raise NotFoundError(f"no snapshots in {self.store.description}", kind="snapshot")
        if len(jobs) > 1:
            raise ConfigError(
                f"which job? there are {', '.join(jobs)}", hint="name one with --job or SNAPD_JOB"
            )
        return jobs[0]

    def candidates(self, job: str, *, step: int | None, generation: int | None) -> list[Candidate]:
        """The snapshots of a job that fit, newest first.

        Raises:
            NotFoundError: there is none.
        """
        every = self.reader(job).candidates()
        found = [c for c in every if step in (None, c.id.step) and generation in (None, c.id.generation)]
        if found:
            return found
        held = ", ".join(str(c.id) for c in every[:8])
        what = f"no such snapshot of job {job!r} in {self.store.description}"
        raise NotFoundError(what, kind="snapshot", hint=f"there is {held}" if held else "")


@contextlib.contextmanager
def opened_tier(url: str) -> Iterator[TierSource]:
    """The tier at `url`, closed at the end.

    Raises:
        ConfigError: the URL or a setting; SnapdError: the store cannot be opened.
    """
    config = load_settings(None).config.tier
    if url == CONFIGURED and not config.shared:
        raise ConfigError(
            "no shared tier is configured", hint="name its URL, or set tier.shared (SNAPD_TIER_SHARED)"
        )
    where = config.shared if url == CONFIGURED else url
    if "://" not in where:
        where = str(Path(where).absolute())
    _refuse_node_folder(where)
    store = store_of(config, _surroundings(), url=where)
    pool = ReadPool(threads=read_threads(config, where))
    try:
        yield TierSource(store, pool)
    except NotFoundError as error:
        if error.kind != "bucket":
            raise
        # an unmounted disk, a bucket that this account does not see: nothing is known of what is there
        raise UnavailableError(error.message, kind=error.kind, hint=error.hint) from error
    finally:
        pool.close()
        store.close()


def _refuse_node_folder(where: str) -> None:
    url = parsed_url(where)
    if url.scheme == FILE and is_node_folder(url.path):
        raise ConfigError(
            f"{url.path} is the own disk of a node (tier.node): it has this node's shards and no commit records",
            kind="disk_shared",
            hint="the daemon of that node reads it into memory when it starts: `snapd ls` there, without --from",
        )


def _surroundings() -> Surroundings:
    return Surroundings(
        time.monotonic, time.time, secrets.SystemRandom().random, lambda: secrets.token_hex(16)
    )


def open_newest(reader: TierReader, candidates: Sequence[Candidate], told: list[Broken]) -> Opened:
    """The newest of them of which record and all shard manifests are good; what is passed over goes into `told`.

    Raises:
        NotRestorable: none is; lists what is wrong with each.
    """
    for candidate in candidates:
        opened = reader.open(candidate, None)
        if isinstance(opened, Opened):
            return opened
        if not opened.is_void:
            told.append(opened)
    raise none_usable(reader.job, told)


def none_usable(job: str, broken: Sequence[Broken]) -> SnapdError:
    if not broken:  # all void
        return NotFoundError(f"job {job!r} has no snapshot any more", kind="snapshot", job=job)
    listed = "; ".join(f"{one.id}: {one.reason}" for one in broken)
    return NotRestorable(f"snapshots of job {job!r} were found, none can be used: {listed}", job=job)


def summary_of(record: StoredSnapshot, shards: Sequence[StoredShard] = ()) -> admin_pb2.SnapshotSummary:
    """A stored snapshot as the lists show it."""
    captured_s = max((shard.captured_wall_time_s for shard in shards), default=record.committed_wall_time_s)
    return admin_pb2.SnapshotSummary(
        job=record.job,
        generation=record.id.generation,
        step=record.id.step,
        world_size=record.world_size,
        ranks_captured=range(record.world_size),
        complete=True,
        nbytes=record.nbytes,
        captured_wall_time_s=captured_s,
        has_parent=record.parent is not None,
        parent_generation=record.parent.generation if record.parent else 0,
        parent_step=record.parent.step if record.parent else 0,
    )


def broken_summary(job: str, broken: Broken) -> admin_pb2.SnapshotSummary:
    """A snapshot that cannot be used, as the lists show it."""
    return admin_pb2.SnapshotSummary(
        job=job, generation=broken.id.generation, step=broken.id.step, problem=broken.reason
    )


def snapshots_in(source: TierSource, job: str) -> list[admin_pb2.SnapshotSummary]:
    """Every snapshot of a job (empty: of all), newest first."""
    found: list[admin_pb2.SnapshotSummary] = []
    for name in [checked_job_name(job)] if job else source.jobs():
        reader = source.reader(name)
        for opened in reader.open_all(reader.candidates()):
            if isinstance(opened, Opened):
                found.append(summary_of(opened.record))
            elif not opened.is_void:
                found.append(broken_summary(name, opened))
    return found
