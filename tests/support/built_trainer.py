"""A fake trainer whose shards hold tensors: what `ShardBuilder` makes goes through a real daemon."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.fake_trainer import FakeTrainer
from tests.support.shard_builder import BuiltShard, ShardBuilder

Describe = Callable[[ShardBuilder], None]


class BuiltTrainer(FakeTrainer):
    """`capture_built` hands over a shard with the tensors that `describe` adds to a builder."""

    _pieces: list[bytes]

    def capture_built(self, step: int, describe: Describe, *, is_waiting: bool = True) -> BuiltShard:
        """A whole snapshot of this rank; returns what it consists of."""
        assert self.page is not None
        builder = ShardBuilder(
            job=self.job,
            generation=self.page.load("generation"),
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            chunk_bytes=self.page.chunk_bytes,
        )
        describe(builder)
        built = builder.build()
        record = built.record
        self._pieces = [built.chunk(index) for index in range(len(record.chunks))]
        self._pieces[0] = self._pieces[0][: record.layout_nbytes]
        self._pieces[1] = self._pieces[1][: record.early_values_nbytes]
        self.capture(step, chunk_count=len(self._pieces), is_waiting=is_waiting)
        return built

    def chunks(self, step: int, seed: int, chunk_count: int) -> list[bytes]:
        return self._pieces
