"""The layouts of a snapshot's ranks, read as they are needed.

A rank that restores into another cut needs the layouts of the ranks whose boxes meet its own, which one layout tells:
it names the mesh and the placements of every DTensor. With hundreds of ranks that saves nearly everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from snapd_proto import format_pb2 as pb

from .transfers import check_bounds

Read = Callable[[Collection[int]], Mapping[int, pb.ShardLayout]]


class Layouts(Mapping[int, pb.ShardLayout]):
    """Rank -> layout, of all saved ranks. What is asked for by its rank is read alone; `need` reads many at once."""

    def __init__(
        self, world_size: int, read: Read, known: Mapping[int, pb.ShardLayout] | None = None
    ) -> None:
        """`read`: gives the layouts of the ranks that it is asked for; raises what a restore raises."""
        self._world_size, self._read = world_size, read
        self._known: dict[int, pb.ShardLayout] = dict(known or {})
        self._prepare: Callable[[pb.ShardLayout], None] = check_bounds

    @classmethod
    def given(cls, layouts: Mapping[int, pb.ShardLayout]) -> Layouts:
        """All of them, read already."""
        return cls(len(layouts), lambda ranks: {rank: layouts[rank] for rank in ranks}, layouts)

    def prepare(self, with_each: Callable[[pb.ShardLayout], None]) -> None:
        """Check every layout, and have `with_each` change it in place before anybody uses it."""

        def prepare(layout: pb.ShardLayout) -> None:
            check_bounds(layout)
            with_each(layout)

        for layout in self._known.values():
            prepare(layout)
        self._prepare = prepare

    def need(self, ranks: Collection[int]) -> None:
        """Read those that are not known yet.

        Raises:
            IntegrityError: one of them is malformed; and what `read` raises.
        """
        missing = sorted(set(ranks) - self._known.keys())
        if missing:
            for rank, layout in self._read(missing).items():
                self._prepare(layout)
                self._known[rank] = layout

    @property
    def known(self) -> Collection[int]:
        """The ranks whose layouts were read."""
        return self._known.keys()

    def __getitem__(self, rank: int) -> pb.ShardLayout:
        if not 0 <= rank < self._world_size:
            raise KeyError(rank)
        self.need([rank])
        return self._known[rank]

    def __contains__(self, rank: object) -> bool:
        return isinstance(rank, int) and 0 <= rank < self._world_size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._world_size))

    def __len__(self) -> int:
        return self._world_size
