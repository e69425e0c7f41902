"""A capture into memory and a restore from it, without daemon, sessions or lanes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from snapd_client.state.apply import PendingRestore, prepare_restore
from snapd_client.state.layout import Binding, Layout, build_layout
from snapd_client.state.tree import StateTree, Walk
from snapd_native import CopyPlan
from snapd_proto import format_pb2 as pb

CHUNK_BYTES = 1 << 16


@dataclass
class Snapshot:
    """One rank's shard: bytes only, as the arena would hold them."""

    data: np.ndarray
    chunk_bytes: int
    layout_nbytes: int
    early_values_offset: int
    early_values_nbytes: int

    @property
    def layout(self) -> pb.ShardLayout:
        return pb.ShardLayout.FromString(self.data[: self.layout_nbytes].tobytes())

    @property
    def early(self) -> pb.EarlyValues:
        start = self.early_values_offset
        return pb.EarlyValues.FromString(self.data[start : start + self.early_values_nbytes].tobytes())

    def chunk(self, number: int, nbytes: int) -> bytes:
        start = number * self.chunk_bytes
        return self.data[start : start + nbytes].tobytes()


class Loopback:
    """Captures of one tree; the layout is kept while it fits, as the client does."""

    def __init__(
        self, tree: StateTree, chunk_bytes: int = CHUNK_BYTES, node_ranks: Sequence[int] = ()
    ) -> None:
        self.tree, self.chunk_bytes, self.node_ranks = tree, chunk_bytes, node_ranks
        self.layout: Layout | None = None
        self.layouts_built = 0
        self._signature: object = None

    def fit(self, walk: Walk) -> tuple[Layout, Binding]:
        if self.layout is not None and self._signature == walk.signature:
            binding = self.layout.bind(walk)
            if binding is not None:
                return self.layout, binding
        layout = build_layout(self.tree, walk, chunk_bytes=self.chunk_bytes, node_ranks=self.node_ranks)
        binding = layout.bind(walk)
        assert binding is not None
        self.layout, self._signature = layout, walk.signature
        self.layouts_built += 1
        return layout, binding

    def capture(self, step: int = 0) -> Snapshot:
        walk = self.tree.walk()
        layout, binding = self.fit(walk)
        early = walk.encode_early(1, step)
        if len(early) > layout.early_values_capacity:
            self._signature = None
            layout, binding = self.fit(walk)
        # filled with a pattern: a byte that nobody writes shows
        data = np.full(len(layout.chunk_nbytes) * self.chunk_bytes, 0xA5, dtype=np.uint8)
        data[: len(layout.serialized)] = np.frombuffer(layout.serialized, dtype=np.uint8)
        start = layout.early_values_offset
        data[start : start + layout.early_values_capacity] = 0
        data[start : start + len(early)] = np.frombuffer(early, dtype=np.uint8)
        bases = _chunk_addresses(data, self.chunk_bytes)
        CopyPlan(*layout.early).run(binding.bases, bases)
        CopyPlan(*layout.lazy).run(binding.bases, bases)
        return Snapshot(data, self.chunk_bytes, len(layout.serialized), start, len(early))


def restore(
    tree: StateTree,
    snapshot: Snapshot,
    *,
    allow_partial: tuple[str, ...] = (),
    others: Mapping[int, Snapshot] | None = None,
) -> PendingRestore:
    """Chunk by chunk, as the client does."""
    shards = {tree.rank: snapshot, **(others or {})}
    layouts = {rank: shard.layout for rank, shard in shards.items() if rank != tree.rank}
    pending = prepare_restore(
        tree, snapshot.layout, snapshot.early, allow_partial=allow_partial, others=layouts
    )
    plan = CopyPlan(*pending.plan)
    addresses = {rank: _chunk_addresses(shard.data, shard.chunk_bytes) for rank, shard in shards.items()}
    bases = array("Q", [addresses[rank][chunk] for rank, chunk in pending.sources])
    for first, count in pending.pieces_of_chunk:
        if count:
            plan.run(bases, pending.destinations, first, count)
    pending.finish()
    return pending


def _chunk_addresses(data: np.ndarray, chunk_bytes: int) -> array[int]:
    base = data.ctypes.data
    return array("Q", range(base, base + len(data), chunk_bytes))


def make_tree(state: object, **overrides: object) -> StateTree:
    """A tree as rank 0 of a world of one makes it, but for what the test is about."""
    options: dict[str, object] = {"rank": 0, "world_size": 1, "job": "test", **overrides}
    return StateTree(state, **options)  # type: ignore[arg-type]
