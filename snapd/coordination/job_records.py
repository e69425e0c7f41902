"""The values below `jobs/JOB/`, as bytes: generations, and the newest complete and protected snapshot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from snapd.core.generations import Generation, GenerationKey
from snapd.core.ids import SnapshotId
from snapd.core.interval import Interval
from snapd.core.reports import Record, Told
from snapd.errors import RemoteProtocolError

GENERATIONS_KEPT = 64
REMOVED_DIGITS_MAX = 20
Table = dict[GenerationKey, Generation]


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest snapshots of a job that are complete on all ranks, and protected, as the collector said last; and the
    interval of that generation. `epoch`: of the table when it was written.
    """

    complete: SnapshotId | None
    protected: SnapshotId | None
    epoch: int
    protected_epoch: int = 0
    generation: int = 0
    interval: Interval = field(default_factory=Interval)

    @classmethod
    def of(cls, record: Record, epoch: int) -> Newest:
        told = record.told
        return cls(
            told.complete, told.protected, epoch, told.protected_epoch, record.generation, record.interval
        )

    @property
    def record(self) -> Record:
        told = Told(self.complete, self.protected, self.protected_epoch)
        return Record(told, self.generation, self.interval)


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


def floors_to_json(floors: dict[str, int]) -> bytes:
    return json.dumps(floors, sort_keys=True, separators=(",", ":")).encode("ascii")


def floors_from_json(data: bytes) -> dict[str, int]:
    """Raises: RemoteProtocolError: kind `record`."""
    try:
        floors = {str(tier): int(number) for tier, number in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RemoteProtocolError("the floors of a job's tiers do not parse", kind="record") from error
    if any(number < 0 for number in floors.values()):
        raise RemoteProtocolError("the floor of a tier is below 0", kind="record")
    return floors


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
    interval = newest.interval
    body = {
        "complete": _id_to_names(newest.complete),
        "protected": _id_to_names(newest.protected),
        "epoch": newest.epoch,
        "protected_epoch": newest.protected_epoch,
        "generation": newest.generation,
        "interval": [interval.configured, interval.factor, interval.from_step, interval.complete_since],
    }
    return json.dumps(body, separators=(",", ":")).encode("ascii")


def newest_from_json(value: bytes) -> Newest:
    """Raise RemoteProtocolError (kind `record`) for anything else."""
    try:
        body = json.loads(value)
        return Newest(
            _id(body["complete"]),
            _id(body["protected"]),
            int(body["epoch"]),
            int(body.get("protected_epoch", 0)),  # a version before did not write these
            int(body.get("generation", 0)),
            _interval(body.get("interval")),
        )
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


def _id_to_names(snapshot: SnapshotId | None) -> dict[str, int] | None:
    return {"generation": snapshot.generation, "step": snapshot.step} if snapshot is not None else None


def _interval(body: Any) -> Interval:
    if body is None:
        return Interval()
    configured, factor, from_step, complete_since = (int(each) for each in body)
    if configured < 1 or factor < 1 or from_step < 0 or complete_since < 0:
        raise ValueError("not an interval")
    return Interval(configured, factor, from_step, complete_since)


def _id(body: Any) -> SnapshotId | None:
    return SnapshotId(int(body["generation"]), int(body["step"])) if body is not None else None
