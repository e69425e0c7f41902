"""Which snapshot goes to the shared tier next, and why: every N steps, every so often, on demand, before the end.

Pure: what is known comes in, a choice with its reason comes out. The same code chooses for one machine and for a
cluster, where the job's collector names the choice to all nodes. One snapshot is flushed at a time; a newer one takes
the place of one that is stuck, and what is durable already, or was overtaken by it, is never flushed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from snapd.core.ids import SnapshotId
from snapd.core.reports import FlushNews

PAUSE_FLOOR_UNKNOWN = "tier_floor"
PAUSE_GENERATION = "tier_generation"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushRules:
    """`every_steps`: at each multiple of it, or the first complete snapshot after one; 0: not by steps. `every_s`: so
    long after the last one was begun; 0: not by time.
    """

    every_steps: int = 0
    every_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushSituation:
    """`newest`: complete on all ranks and not known to be bad. `durable`: the newest of this job that is committed in
    the tier. `current`: the one that is being flushed; `stuck`: why it does not go on, if it does not. `first_step`:
    the first step of the newest's generation that was complete. `waited_s`: since the last flush was begun. `floor`:
    the highest generation that the tier had before the job began; None: it could not be asked yet. `wanted`: asked
    for, this one or a newer one. `is_ending`: this node goes away. `is_brought`: the newest came from the tier.
    `generation`: that the job has now; the newest may still be of an older one, or have come from the tier.
    """

    newest: SnapshotId | None = None
    durable: SnapshotId | None = None
    current: SnapshotId | None = None
    stuck: str = ""
    first_step: int = 0
    waited_s: float = 0.0
    floor: int | None = 0
    wanted: SnapshotId | None = None
    is_ending: bool = False
    is_brought: bool = False
    generation: int = 0


@dataclass(frozen=True, slots=True)
class FlushChoice:
    """`snapshot`: to be flushed now. `due_s`: without one, look again after that time; None: only when something
    changes. `pause`: the kind of what holds the level up, where that is not the store's matter.
    """

    snapshot: SnapshotId | None
    reason: str
    due_s: float | None = None
    pause: str = ""


def choose_flush(rules: FlushRules, situation: FlushSituation) -> FlushChoice:
    """What to flush now."""
    newest, current, durable = situation.newest, situation.current, situation.durable
    if newest is None:
        return FlushChoice(None, "nothing is complete")
    if situation.floor is None:
        return FlushChoice(
            None, "it is not known yet which generations the tier has", pause=PAUSE_FLOOR_UNKNOWN
        )
    if situation.is_brought:
        return FlushChoice(None, "the newest complete snapshot came from there")
    if newest.generation <= situation.floor < situation.generation:
        return FlushChoice(None, f"nothing of generation {situation.generation} is complete yet")
    if newest.generation <= situation.floor:
        reason = (
            f"the tier had generation {situation.floor} of this job before this start of it, which has generation"
            f" {newest.generation}: it gets a newer one when the job's world is started anew"
        )
        return FlushChoice(None, reason, pause=PAUSE_GENERATION)
    if current is not None and current.generation > situation.floor and not _is_durable(current, durable):
        if situation.stuck and newest > current:
            return FlushChoice(newest, f"{current} is stuck ({situation.stuck}), and {newest} is newer")
        return FlushChoice(current, "being flushed")
    if _is_durable(newest, durable):
        return FlushChoice(None, "the newest complete snapshot is durable")
    return _due(rules, situation, newest)


def choose_for_world(
    whole: Sequence[SnapshotId], current: SnapshotId | None, news: Iterable[FlushNews]
) -> tuple[SnapshotId | None, SnapshotId | None]:
    """(what all nodes of a world flush now, the newest durable one), from what they say. `whole`: snapshots of which
    every shard is somewhere, oldest first; `current`: what was named before; it is not given up while some node is
    still writing its part.
    """
    said = list(news)
    durable = max((each.durable for each in said if each.durable is not None), default=None)
    newest = whole[-1] if whole else None
    if newest is None:
        return None, durable
    is_going_on = current in whole and current is not None and not _is_durable(current, durable)
    is_stuck = any(each.stuck for each in said) and not any(each.is_busy for each in said)
    if is_going_on and not (is_stuck and current is not None and newest > current):
        return current, durable
    wishes = [each.wish for each in said if each.wish is not None and not _is_durable(each.wish, durable)]
    if (is_going_on or wishes) and not _is_durable(newest, durable):
        return newest, durable
    return None, durable


def choose_for_disks(
    holders: Mapping[SnapshotId, Mapping[int, Collection[str]]],
    whole: Sequence[SnapshotId],
    current: SnapshotId | None,
    news: Mapping[str, FlushNews],
    before: SnapshotId | None,
) -> tuple[SnapshotId | None, SnapshotId | None]:
    """(what each node of a world writes to its own disk now, the newest that is on the disks of all that have it).

    All take the same one: disks that each have another snapshot are of no use together. `holders`: snapshot -> rank ->
    nodes that have the shard; `whole`: those of which every shard is somewhere, oldest first; `current`: named before,
    and not given up while some node that has a disk is still to write its part; `news`: by node, of those with a disk;
    `before`: what was on all disks before.
    """

    def is_on_all(snapshot: SnapshotId) -> bool:
        ranks = holders[snapshot].values()
        return all(any(_has_written(news, node, snapshot) for node in nodes) for nodes in ranks)

    durable = max((s for s in (before, *filter(is_on_all, whole)) if s is not None), default=None)
    if not whole:
        return None, durable
    newest = whole[-1]
    if current is not None and current in whole:
        nodes = {node for nodes in holders[current].values() for node in nodes if node in news}
        is_going_on = any(not _has_written(news, node, current) for node in nodes)
        is_stuck = any(each.stuck for each in news.values()) and not any(e.is_busy for e in news.values())
        if is_going_on and not (is_stuck and newest > current):
            return current, durable
    is_wished = any(each.wish is not None for each in news.values())
    return (newest if is_wished and not is_on_all(newest) else None), durable


def _has_written(news: Mapping[str, FlushNews], node: str, snapshot: SnapshotId) -> bool:
    return node in news and news[node].durable == snapshot


def _is_durable(snapshot: SnapshotId, durable: SnapshotId | None) -> bool:
    return durable is not None and durable >= snapshot


def _due(rules: FlushRules, situation: FlushSituation, newest: SnapshotId) -> FlushChoice:
    wanted = situation.wanted
    if situation.is_ending:
        return FlushChoice(newest, "this node goes away")
    if wanted is not None and newest >= wanted and not _is_durable(wanted, situation.durable):
        return FlushChoice(newest, "asked for")
    counted_from = counted_from_step(situation.durable, newest.generation, situation.first_step)
    if rules.every_steps and newest.step // rules.every_steps > counted_from // rules.every_steps:
        return FlushChoice(newest, f"every {rules.every_steps} steps")
    if rules.every_s and situation.waited_s >= rules.every_s:
        return FlushChoice(newest, f"every {rules.every_s:g} s")
    return _not_yet(rules, situation, counted_from)


def _not_yet(rules: FlushRules, situation: FlushSituation, counted_from: int) -> FlushChoice:
    reasons = []
    if rules.every_steps:
        reasons.append(f"at step {(counted_from // rules.every_steps + 1) * rules.every_steps}")
    due_s = rules.every_s - situation.waited_s if rules.every_s else None
    if due_s is not None:
        reasons.append(f"in {due_s:.0f} s")
    if not reasons:
        return FlushChoice(None, "flushed on demand and before the end only")
    return FlushChoice(None, "next " + " or ".join(reasons), due_s=due_s)


def counted_from_step(durable: SnapshotId | None, generation: int, first_step: int) -> int:
    """The step from which steps are counted: of the last durable snapshot; a generation that went back behind it
    counts from where it began.
    """
    if durable is not None and durable.generation == generation:
        return durable.step
    began = max(0, first_step - 1)
    return began if durable is None else min(durable.step, began)
