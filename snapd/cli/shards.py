"""Opening the shards of a snapshot at the daemon, for the commands that look inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snapd_proto import admin_pb2, format_pb2

from snapd.errors import IntegrityError, NotFoundError, NotRestorable, SnapdError
from snapd.export.shard_bytes import ShardBytes
from snapd.export.shard_view import ShardView, open_shard, read_layout
from snapd.rpc.local_client import LocalClient

_ATTEMPTS_MAX = 5


def fetch_bytes(client: LocalClient, record: format_pb2.ShardRecord) -> ShardBytes:
    """A shard's bytes, readable while the client is connected.

    Raises:
        NotFoundError: the snapshot was given up meanwhile.
        IntegrityError: its record contradicts itself.
    """
    segments = client.fetch_shard(record.job, record.generation, record.step, record.rank)
    return ShardBytes(record, segments)


def read_layouts(
    client: LocalClient, records: Iterable[format_pb2.ShardRecord]
) -> tuple[dict[int, format_pb2.ShardLayout], list[SnapdError]]:
    """The layouts by rank, and why those that are missing could not be read."""
    layouts: dict[int, format_pb2.ShardLayout] = {}
    problems: list[SnapdError] = []
    for record in records:
        try:
            layouts[record.rank] = read_layout(fetch_bytes(client, record))
        except (IntegrityError, NotFoundError) as error:
            problems.append(error)
    return layouts, problems


def open_snapshot(
    client: LocalClient, job: str, *, step: int | None, generation: int | None, ranks: Sequence[int]
) -> tuple[admin_pb2.GetSnapshotReply, dict[int, ShardView]]:
    """The shards of `ranks` (empty: of all), and of the ranks that hold bytes for them.

    A running job gives a snapshot up as soon as a newer one is complete: then the newest is asked for again,
    unless a step was named.

    Raises:
        NotFoundError: there is no such snapshot.
        NotRestorable: a rank that was asked for is not in it.
        IntegrityError: a layout cannot be read.
    """
    attempt = 1
    while True:
        reply = client.get_snapshot(job, step=step, generation=generation)
        try:
            return reply, _open_shards(client, reply, ranks)
        except NotFoundError:
            if step is not None or attempt == _ATTEMPTS_MAX:
                raise
            attempt += 1


def _open_shards(
    client: LocalClient, reply: admin_pb2.GetSnapshotReply, ranks: Sequence[int]
) -> dict[int, ShardView]:
    summary = reply.summary
    records = {record.rank: record for record in reply.shards}
    wanted = set(ranks) or set(range(summary.world_size))
    views: dict[int, ShardView] = {}
    while missing := sorted(wanted - set(views)):
        rank = missing[0]
        if rank not in records:
            what = f"step {summary.step} of job {summary.job!r} has no shard of rank {rank}"
            hint = "snapd ls shows which ranks captured it; --rank exports some of them"
            raise NotRestorable(what, hint=hint)
        views[rank] = open_shard(fetch_bytes(client, records[rank]))
        held = (region.held_by_rank_plus_one for region in views[rank].layout.regions)
        wanted.update(plus_one - 1 for plus_one in held if plus_one)
    return views
