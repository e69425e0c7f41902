"""The values below `jobs/JOB/`, as bytes: generations, and the newest complete and protected snapshot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from snapd.core.generations import Generation, GenerationKey
from snapd.core.ids import SnapshotId
from snapd.errors import RemoteProtocolError

GENERATIONS_KEPT = 64
REMOVED_DIGITS_MAX = 20
Table = dict[GenerationKey, Generation]


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest snapshots of a job that are complete on all ranks, and protected, as the collector said last."""

    complete: SnapshotId | None
    protected: SnapshotId | None
    epoch: int


def bounded(rows: Iterable[Generation]) -> Table:
    """The newest rows, by key."""
    kept = sorted(rows, key=lambda row: row.number)[-GENERATIONS_KEPT:]
    return {(row.incarnation, row.rollback_count): row for row in kept}


def merged(stored: Table, known: Table) -> Table:
    """`stored`, with the rows of `known` that it lacks; where both gave out a number, the store's row stays."""
    numbers = {row.number for row in stored.values()}
    missing = (row for key, row in known.items() if key not in stored and row.number not in numbers)
    return bounded([*stored.values(), *missing])


def newest_number(table: Table) -> int:
    return max((row.number for row in table.values()), default=0)


def generations_to_json(table: Table) -> bytes:
    rows = sorted(table.values(), key=lambda row: row.number)
    body = [
        [row.number, row.incarnation, row.rollback_count, row.world_size, _id_to_fields(row.parent)]
        for row in rows
    ]
    return json.dumps(body, separators=(",", ":")).encode("ascii")


def generations_from_json(value: bytes | None) -> Table:
    """Raise RemoteProtocolError (kind `record`) for anything else. None: no rows."""
    if value is None:
        return {}
    try:
        return bounded(_row(*fields) for fields in json.loads(value))
    except (ValueError, TypeError, RecursionError) as error:
        raise RemoteProtocolError("not a table of generations", kind="record") from error


def removed_from_bytes(value: bytes | None) -> int:
    """Raise RemoteProtocolError (kind `record`) for anything but a number. None: 0."""
    if value is None:
        return 0
    if not value.isdigit() or len(value) > REMOVED_DIGITS_MAX:
        raise RemoteProtocolError("not the number of a generation", kind="record")
    return int(value)


def newest_to_json(newest: Newest) -> bytes:
    return json.dumps(asdict(newest), separators=(",", ":")).encode("ascii")


def newest_from_json(value: bytes) -> Newest:
    """Raise RemoteProtocolError (kind `record`) for anything else."""
    try:
        body = json.loads(value)
        return Newest(_id(body["complete"]), _id(body["protected"]), int(body["epoch"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RemoteProtocolError("not a record of the newest snapshots", kind="record") from error


def _row(number: Any, incarnation: Any, rollback_count: Any, world_size: Any, parent: Any) -> Generation:
    counts = (number, rollback_count, world_size)
    if not isinstance(incarnation, str) or not all(isinstance(each, int) and each >= 0 for each in counts):
        raise ValueError("not a generation")
    return Generation(
        number, incarnation, rollback_count, world_size, SnapshotId(*parent) if parent else None
    )


def _id_to_fields(snapshot: SnapshotId | None) -> list[int] | None:
    return [snapshot.generation, snapshot.step] if snapshot else None


def _id(body: Any) -> SnapshotId | None:
    return SnapshotId(int(body["generation"]), int(body["step"])) if body is not None else None
