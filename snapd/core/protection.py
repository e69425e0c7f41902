"""What the protection of a snapshot consists of, as plain data: whose rows, whose records, and the plan that follows.

A row map is small and is stored; its rows are recomputed from the records that it names, by the same pure function on
every member, so the plan's identity tells whether two members mean the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from snapd.core.cluster import Code
from snapd.core.ids import SnapshotId
from snapd.core.manifest import ShardRecord
from snapd.core.rows import Row, chunks_of, plan_id, plan_rows


@dataclass(frozen=True, slots=True)
class RowMap:
    """The rows of one snapshot in one group, under the epoch of the group table that made them."""

    id: SnapshotId
    epoch: int
    group: int
    nodes: tuple[str, ...]
    code: Code

    @property
    def key(self) -> tuple[SnapshotId, int]:
        return self.id, self.epoch


@dataclass(frozen=True, slots=True)
class PlacedRecord:
    """A shard's record, and the node whose shard it is in the row plan."""

    node: str
    record: ShardRecord


@dataclass(frozen=True, slots=True)
class RowPlan:
    """All rows of a row map. `identity`: equal on two nodes if and only if they planned the same rows in the same
    places. `frame_bytes`: the largest chunk that any fragment can have to hold.
    """

    map: RowMap
    rows: tuple[Row, ...]
    identity: bytes
    frame_bytes: int

    def led_by(self, node: str) -> list[Row]:
        """Rows whose first parity node this is: it encodes them."""
        return [row for row in self.rows if row.parity_nodes and row.parity_nodes[0] == node]

    def given_to(self, node: str) -> list[tuple[Row, int]]:
        """The parity fragments that this node is to hold: (row, number)."""
        return [
            (row, number)
            for row in self.rows
            for number, parity_node in enumerate(row.parity_nodes)
            if parity_node == node
        ]


def make_plan(row_map: RowMap, records: Iterable[PlacedRecord]) -> RowPlan:
    """Plan the rows; the order of `records` does not matter."""
    by_node: dict[str, list[ShardRecord]] = {node: [] for node in row_map.nodes}
    frame_bytes = 0
    for placed in sorted(records, key=lambda placed: placed.record.rank):
        by_node[placed.node].append(placed.record)
        frame_bytes = max(frame_bytes, placed.record.chunk_bytes)
    chunks = {node: chunks_of(node, found) for node, found in by_node.items()}
    rows = plan_rows(row_map.code, row_map.nodes, chunks)
    return RowPlan(row_map, rows, plan_id(row_map.nodes, rows), frame_bytes)
