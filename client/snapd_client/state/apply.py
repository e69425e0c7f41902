"""Writing a snapshot back into the live state: first compare everything, then touch.

`prepare_restore` raises before anything live is changed. Between it and `finish` the caller copies the bytes,
chunk by chunk, as the plan says. `finish` puts the values back: containers and attributes in place, then
objects with `load_state_dict`, then the loaders, and the global generators last.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence

import torch
from snapd_proto import format_pb2 as pb

from ..errors import IntegrityError, RestoreMismatch
from . import rng
from .match import Builder, Differences, Matcher
from .names import Names
from .parts import Parts
from .pieces import PlanArrays
from .recut import Recut, needs_recut, recut
from .resharding import Elastic
from .tree import StateTree
from .wrappers import align_names

_log = logging.getLogger(__name__)

__all__ = ["PendingRestore", "is_cut_alike", "names_of", "prepare_restore"]


class PendingRestore:
    """A restore whose bytes are still to come.

    `plan`: copies from chunks to `destinations` (addresses, held alive by this object), sorted by chunk; those in
    `device_of` are addresses on that device.
    `sources[i]`: (rank, chunk of its shard) of chunk i: first all of this rank's own shard, then those of other
    ranks that keep bytes for it. `pieces_of_chunk[i]`: the first piece of chunk i and their count.
    `report`: what allow_partial let pass.
    """

    def __init__(
        self, tree: StateTree, matcher: Matcher, parts: Parts, root: Builder, generators: int
    ) -> None:
        self._tree, self._matcher, self._parts = tree, matcher, parts
        self._root, self._generators = root, generators
        planned = matcher.destinations.plan()
        self.plan: PlanArrays = planned.arrays
        self.destinations: array[int] = planned.destinations
        self.device_of: dict[int, torch.device] = matcher.destinations.device_of
        self.sources: list[tuple[int, int]] = planned.sources
        self.pieces_of_chunk: list[tuple[int, int]] = planned.pieces_of_source
        self.report = list(matcher.differences.report)
        self.values: dict[str, object] = {}
        self._is_new_rank = tree.rank >= matcher.layout.world_size
        self._is_finished = False

    def finish(self) -> None:
        """After all bytes are in place, once. `values` then holds what could not be put back in place."""
        if self._is_finished:
            raise IntegrityError("this restore was finished before")
        self._is_finished = True
        self._matcher.destinations.finish()
        self._root()
        for load in self._parts.late:
            load()
        self.values = dict(self._parts.values)
        self._tree.restored_values = dict(self.values)
        absent = rng.restore(self._matcher.decode(self._generators))
        if self._is_new_rank:
            rng.part(self._tree.rank)
            _log.warning(
                "snapd: rank %d was not among the ranks of the snapshot: its random numbers begin anew",
                self._tree.rank,
            )
        self.report.extend(f"missing: generator of {name}" for name in absent)
        if self.report:
            shown = ", ".join(self.report[:10]) + (", ..." if len(self.report) > 10 else "")
            _log.warning("snapd: restored in part (%d names differ): %s", len(self.report), shown)


def names_of(tree: StateTree) -> Names:
    """What the live state is called now; with thousands of tensors it takes a while, so a restore asks once."""
    return Names(tree.state, tree.vouched)


def is_cut_alike(tree: StateTree, layout: pb.ShardLayout, names: Names) -> bool:
    """Whether the live state is cut as the layout's rank was: nothing has to be put together from several shards."""
    return not needs_recut(layout, tree.state, names)


def prepare_restore(
    tree: StateTree,
    layout: pb.ShardLayout,
    early: pb.EarlyValues,
    *,
    allow_partial: Sequence[str] = (),
    others: Mapping[int, pb.ShardLayout] | None = None,
    elastic: Elastic | None = None,
    names: Names | None = None,
) -> PendingRestore:
    """Compare a snapshot with the live state and choose where each byte goes. Nothing live is changed.

    Args:
        others: layouts of other ranks' shards, where replicas share out their bytes (rank -> layout).
        elastic: the state may be cut otherwise here, or by another number of ranks.
        names: of the live state, if they were asked for before.
        allow_partial: patterns (fnmatch) of names that may be missing, extra or reshaped; they are left as
            they are.
    Raises:
        RestoreMismatch: with the three lists.
        IntegrityError: the layout or the values are malformed.
    """
    names = names or names_of(tree)
    tree.vouch_for_optimizers()
    differences = Differences(allow_partial)
    anew = Recut(layout)
    if elastic is not None:
        elastic.layouts.prepare(lambda one: align_names(one, tree.state, names))
        anew = recut(elastic.layouts[layout.rank], elastic.layouts, tree.state, names)
        layout, others = anew.layout, elastic.layouts
        differences.reshaped.extend(
            f"{name} ({why})" for name, why in anew.refused
        )  # there is nothing to leave
    matcher = Matcher(layout, early, names, differences, tree.vouched, others, anew.fills)
    for number in anew.dropped:
        matcher.destinations.drop(number)
    parts = Parts(matcher, elastic, tree.rank, tree.world_size)
    saved = {
        key.text: value
        for key, value in zip(layout.skeleton.mapping.keys, layout.skeleton.mapping.values, strict=True)
    }
    if "state" not in saved or "rng" not in saved:
        raise IntegrityError("the layout has no state")
    root = parts.entries(saved["state"], tree.state)
    for first, second in matcher.destinations.overlaps():
        _settle_overlap(matcher, first, second)
    if differences:
        raise RestoreMismatch(
            missing=differences.missing, extra=differences.extra, reshaped=differences.reshaped
        )
    matcher.destinations.allocate()
    return PendingRestore(tree, matcher, parts, root, saved["rng"].scalar)


def _settle_overlap(matcher: Matcher, first: int, second: int) -> None:
    """Two saved tensors with bytes of their own whose live tensors share some."""
    one, other = matcher.layout.tensors[first], matcher.layout.tensors[second]
    if other.role in ("parameter", "buffer"):
        matcher.differences.note(
            "reshaped", other.name, f"shares memory with {one.name} here, not in the snapshot"
        )
    else:
        matcher.destinations.unclaim(second)
