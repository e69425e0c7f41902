"""Opening the shards of a snapshot in a tier, for the commands that look inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from snapd_proto import admin_pb2, format_pb2

from snapd.cli.tier_source import TierSource, none_usable, open_newest, opened_tier, summary_of
from snapd.errors import IntegrityError, NotRestorable, SnapdError
from snapd.export.shard_view import ShardView, open_shard, read_layout
from snapd.tier.reading import Broken, Opened, TierReader
from snapd.tier.shard_bytes import BatchReader, StoredShardBytes, record_of


def show_stored(
    url: str, job: str, *, step: int | None, generation: int | None
) -> tuple[admin_pb2.GetSnapshotReply, dict[int, format_pb2.ShardLayout], list[SnapdError]]:
    """What `show` shows, out of a tier: the reply of a daemon, layouts by rank, and what could not be read.

    Raises:
        NotFoundError, NotRestorable, SnapdError: there is none, none is good, the store cannot be asked.
    """
    with opened_tier(url) as source:
        reader = source.reader(job)
        broken: list[Broken] = []
        opened = open_newest(reader, source.candidates(job, step=step, generation=generation), broken)
        problems: list[SnapdError] = [
            NotRestorable(f"{one.id}: {one.reason}", kind="tier_manifest") for one in broken
        ]
        reply = admin_pb2.GetSnapshotReply(summary=summary_of(opened.record, [*opened.shards.values()]))
        layouts: dict[int, format_pb2.ShardLayout] = {}
        with BatchReader(reader) as batches:
            for rank, shard in sorted(opened.shards.items()):
                reply.shards.append(record_of(shard))
                try:
                    layouts[rank] = read_layout(StoredShardBytes(batches, shard))
                except IntegrityError as error:
                    problems.append(error)
        return reply, layouts, problems


@contextmanager
def stored_views(reader: TierReader, opened: Opened, ranks: Sequence[int]) -> Iterator[dict[int, ShardView]]:
    """The shards of `ranks` (empty: of all), and of those that hold bytes for them, readable inside the context.

    Raises:
        NotRestorable: a rank that was asked for is not in it. IntegrityError: a layout or early values are bad.
    """
    wanted = set(ranks) or set(opened.shards)
    views: dict[int, ShardView] = {}
    with BatchReader(reader) as batches:
        while missing := sorted(wanted - set(views)):
            rank = missing[0]
            if rank not in opened.shards:
                what = f"step {opened.id.step} of job {reader.job!r} has no shard of rank {rank}"
                raise NotRestorable(what, hint=f"it was captured by {opened.record.world_size} ranks")
            views[rank] = open_shard(StoredShardBytes(batches, opened.shards[rank]))
            held = (region.held_by_rank_plus_one for region in views[rank].layout.regions)
            wanted.update(plus_one - 1 for plus_one in held if plus_one)
        yield views


def usable_snapshots(
    source: TierSource, reader: TierReader, *, step: int | None, generation: int | None, broken: list[Broken]
) -> Iterator[Opened]:
    """Newest first, those of which all manifests are good; the caller adds to `broken` what it finds bad itself.

    Raises:
        NotRestorable: no further one is good; lists what is wrong with each.
    """
    for candidate in source.candidates(reader.job, step=step, generation=generation):
        opened = reader.open(candidate, None)
        if isinstance(opened, Opened):
            yield opened
        elif not opened.is_void:
            broken.append(opened)
    raise none_usable(reader.job, broken)
