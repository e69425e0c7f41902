"""Which snapshots a node keeps on its own disk, and which of them it brings back into memory. Pure.

A disk of one node has no commit records: a snapshot is whole there when the manifests of all ranks are that this node
had. Alone these are all ranks of the world. In a cluster a node cannot know from its disk alone which ranks it had, but
within a generation they stay the same: what has fewer than another snapshot of that generation was cut off.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from snapd.core.ids import SnapshotId


@dataclass(frozen=True, slots=True)
class DiskPart:
    """What the disk has of one snapshot. `ranks`: those whose manifest is good; `world_size`: 0 if none is."""

    id: SnapshotId
    ranks: frozenset[int]
    world_size: int


def whole_parts(parts: Collection[DiskPart], *, is_alone: bool) -> list[SnapshotId]:
    """Those that are whole as far as this node goes, newest first. `is_alone`: worlds do not span nodes."""
    found = []
    for part in sorted(parts, key=lambda part: part.id, reverse=True):
        if not part.ranks:
            continue
        is_whole = len(part.ranks) == part.world_size if is_alone else not _is_cut_off(part, parts)
        if is_whole:
            found.append(part.id)
    return found


def _is_cut_off(part: DiskPart, parts: Collection[DiskPart]) -> bool:
    return any(
        other.id.generation == part.id.generation
        and other.world_size == part.world_size
        and other.ranks > part.ranks
        for other in parts
    )


def parts_to_drop(
    parts: Collection[DiskPart], *, keep: int, is_alone: bool, common: SnapshotId | None = None
) -> list[SnapshotId]:
    """What may be deleted, oldest first: everything that is older than the newest whole snapshot but for the newest
    `keep` (>= 1) whole ones, and `common`, the newest that the disks of all nodes are known to have: others may not
    have any of ours that is newer. What is newer is being written, or was cut off: the next one takes its place.
    """
    whole = whole_parts(parts, is_alone=is_alone)
    if not whole:
        return []
    kept = {*whole[: max(1, keep)], common}
    return sorted(part.id for part in parts if part.id < whole[0] and part.id not in kept)


def parts_to_bring(
    parts: Collection[DiskPart], *, newest_here: SnapshotId | None, is_alone: bool
) -> list[SnapshotId]:
    """What memory lacks, newest first: all that is whole and newer than anything that memory has. Whoever brings them
    takes as many of the newest as are good and wanted.
    """
    whole = whole_parts(parts, is_alone=is_alone)
    return [snapshot for snapshot in whole if newest_here is None or snapshot > newest_here]


def held_to_let_go(
    held: Collection[SnapshotId], *, newest: SnapshotId | None, parent: SnapshotId | None, slots: int
) -> list[SnapshotId]:
    """Which of the snapshots that were brought need not be held in memory any more: all, once one that is newer than
    they is complete. Before, where the job goes on from `parent` already, those that leave it no slot to capture into:
    with few slots set by hand, an older one that was brought beside it in case that the disks differ.
    """
    if newest is not None and held and newest > max(held):
        return sorted(held)
    surplus = len(held) - (slots - 1)
    if parent is None or surplus <= 0:
        return []
    return sorted(snapshot for snapshot in held if snapshot != parent)[:surplus]
