"""Rows: which chunks of a group's nodes are coded together, and which nodes hold the parity.

A pure function of the shard records of one snapshot and of the group: every member computes the same plan from the same
records, so no node has to be asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowChunk:
    """A data fragment: one chunk of one rank's shard, which lies on `node`."""

    node: str
    rank: int
    index: int
    nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """Data fragments in coding order (at most k; an absent one counts as zeros and is neither sent nor stored), and
    the nodes of the parity fragments 0..m-1. `id`: identity of (code, digests and sizes in order): equal rows have
    equal parity. `nbytes`: of each parity fragment, the largest of its chunks.
    """

    number: int
    id: bytes
    chunks: tuple[RowChunk, ...]
    parity_nodes: tuple[str, ...]
    nbytes: int
