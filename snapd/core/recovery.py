"""Which snapshot a world of many nodes restores: from what the nodes hold to one choice, with sources for every shard.

Pure. A shard has a source when a living node has its bytes, or when in every row that covers it at least k fragments
are there (data on living nodes, parity, and absent data fragments, which are zeros). Absent, proved bad and out of
reach are three answers; an older snapshot is taken only when no node that is merely out of reach could make a newer one
whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.core.cluster import Code
from snapd.core.ids import SnapshotId
from snapd.core.reports import Held
from snapd.core.restore import Decision, Outcome, Verdict
from snapd.core.rows import Row
from snapd.core.words import SHOWN, listed

# Why a shard that was there is not: its node is lost, or has dropped it since.
GONE = "no node has its shard any more"
ALL_GONE = "it was complete; no node has anything of it any more"


@dataclass(frozen=True, slots=True)
class HeldRows:
    """What a node has of the protection of one snapshot: whose rows, which parity (row id, number of the fragment),
    which shards' records.
    """

    id: SnapshotId
    group: int
    epoch: int
    nodes: tuple[str, ...]
    code: Code
    fragments: frozenset[tuple[bytes, int]]
    record_ranks: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All that one node holds of a job. `is_here`: it has the job at all; `generation`: the newest that it knows;
    `live_ranks`: those with a trainer there.
    """

    node: str
    held: tuple[Held, ...] = ()
    rows: tuple[HeldRows, ...] = ()
    problems: tuple[tuple[SnapshotId, str], ...] = ()
    is_here: bool = False
    generation: int = 0
    live_ranks: tuple[int, ...] = ()
    arena_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows that a group planned for a snapshot, recomputed from the records that survive."""

    id: SnapshotId
    group: int
    epoch: int
    nodes: tuple[str, ...]
    code: Code
    rows: tuple[Row, ...]
    record_nodes: tuple[str, ...]
    world_size: int = 0  # of the snapshot, as its records say; 0: not known


@dataclass(frozen=True, slots=True)
class Stored:
    """A snapshot in the shared tier. `problem`: why it cannot be used from there; `world_size` is then not known."""

    id: SnapshotId
    world_size: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one shard comes from: whole on `nodes`, else decoded from `row_set`, else from the shared tier."""

    rank: int
    nodes: tuple[str, ...]
    row_set: RowSet | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A decision (as on one machine) and the sources of the chosen snapshot. `unreachable`: whom it waits for."""

    decision: Decision
    sources: tuple[Source, ...] = ()
    unreachable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known when a choice is made. `newest_known`: the newest snapshot that was recorded as complete, and its
    world size where that is known. `unreachable`: members that may live and did not answer. `stored`: what the shared
    tier has, as far as it was asked.
    """

    inventories: Sequence[Inventory]
    row_sets: Sequence[RowSet] = ()
    unreachable: Collection[str] = ()
    newest_known: SnapshotId | None = None
    world_size: int
    step: int | None = None
    accept_older: bool = False
    is_elastic: bool = False  # a snapshot of another number of ranks will do
    stored: Sequence[Stored] = ()


@dataclass(slots=True)
class _Facts:
    world_size: int
    nodes_of: dict[int, set[str]] = field(default_factory=dict)


def gaps(inventories: Iterable[Inventory]) -> dict[SnapshotId, list[int]]:
    """Snapshots of which some shards are whole on no node (or all of them: then others have parity at most): the ranks
    whose rows have to be looked at.
    """
    inventories = list(inventories)
    facts = _facts(inventories)
    found = {
        snapshot: missing
        for snapshot, known in facts.items()
        if (missing := [rank for rank in range(known.world_size) if rank not in known.nodes_of])
    }
    for inventory in inventories:
        for rows in inventory.rows:
            if rows.id not in facts:
                found[rows.id] = sorted({*found.get(rows.id, ()), *rows.record_ranks})
    return found


@dataclass(frozen=True, slots=True)
class WantedRows:
    """The rows that a group planned for a snapshot under an epoch."""

    id: SnapshotId
    group: int
    epoch: int
    nodes: tuple[str, ...]


def records_wanted(inventories: Sequence[Inventory]) -> dict[WantedRows, list[str]]:
    """Whose rows a choice needs to know, and which nodes have the records from which they are planned again."""
    incomplete = gaps(inventories)
    wanted: dict[WantedRows, list[str]] = {}
    for inventory in inventories:
        for rows in inventory.rows:
            if rows.id in incomplete:
                key = WantedRows(rows.id, rows.group, rows.epoch, rows.nodes)
                wanted.setdefault(key, []).append(inventory.node)
    return wanted


def choose_among_nodes(situation: Situation) -> Choice:
    """The newest snapshot with a source for every shard.

    Outcomes: as `restore.choose`, and UNREACHABLE when a member that did not answer may hold what makes a newer
    snapshot whole (unless `accept_older`).
    """
    facts = _facts(situation.inventories, situation.row_sets)
    problems = {s: text for inventory in situation.inventories for s, text in inventory.problems}
    stored = {one.id: one for one in situation.stored}
    for one in situation.stored:
        if not one.problem:
            facts.setdefault(one.id, _Facts(one.world_size))
    candidates = set(facts) | set(stored)
    candidates |= {situation.newest_known} if situation.newest_known is not None else set()
    verdicts: list[Verdict] = []
    chosen: SnapshotId | None = None
    sources: tuple[Source, ...] = ()
    doubtful: SnapshotId | None = None
    for snapshot in sorted(candidates, reverse=True):
        if chosen is not None:
            verdicts.append(Verdict(snapshot, "older", f"{chosen} is newer"))
            continue
        if situation.step is not None and snapshot.step != situation.step:
            verdicts.append(Verdict(snapshot, "other step", f"step {situation.step} was asked for"))
            continue
        in_tier = stored.get(snapshot)
        is_stored = in_tier is not None and not in_tier.problem
        bad_there = f"; in the tier: {in_tier.problem}" if in_tier is not None and in_tier.problem else ""
        if snapshot in problems and not is_stored:
            verdicts.append(Verdict(snapshot, "unusable", problems[snapshot] + bad_there))
            continue
        if snapshot in problems:  # which of the nodes' shards are good is not known here
            found, lacking = tuple(Source(rank, ()) for rank in range(facts[snapshot].world_size)), ""
        else:
            found, lacking = _sources(snapshot, facts.get(snapshot), situation, is_stored=is_stored)
        if not lacking:
            chosen, sources = snapshot, found
            verdicts.append(Verdict(snapshot, "chosen", _how(found)))
        elif bad_there:
            verdicts.append(Verdict(snapshot, "unusable", lacking + bad_there))
            doubtful = doubtful or snapshot
        else:
            verdicts.append(Verdict(snapshot, "incomplete", lacking))
            doubtful = doubtful or snapshot
    return _decide(situation, chosen, sources, doubtful, verdicts, facts)


def _decide(
    situation: Situation,
    chosen: SnapshotId | None,
    sources: tuple[Source, ...],
    doubtful: SnapshotId | None,
    verdicts: list[Verdict],
    facts: Mapping[SnapshotId, _Facts],
) -> Choice:
    unreachable = tuple(sorted(situation.unreachable))
    if unreachable and doubtful is not None and not situation.accept_older:
        reason = f"{listed(unreachable)} did not answer and may hold what {doubtful} lacks"
        return Choice(Decision(Outcome.UNREACHABLE, chosen, tuple(verdicts), reason), (), unreachable)
    if unreachable and chosen is None:
        reason = f"{listed(unreachable)} did not answer, and no other node holds a whole snapshot"
        return Choice(Decision(Outcome.UNREACHABLE, None, tuple(verdicts), reason), (), unreachable)
    if chosen is None:
        return Choice(_nothing(verdicts, situation.step))
    world_size = facts[chosen].world_size
    if world_size != situation.world_size and not situation.is_elastic:
        reason = f"{chosen} was captured by {world_size} ranks, this world has {situation.world_size}"
        return Choice(Decision(Outcome.WORLD_SIZE_DIFFERS, chosen, tuple(verdicts), reason))
    reason = "the newest snapshot with a source for every shard"
    passed_over = [verdict for verdict in verdicts if verdict.verdict in ("incomplete", "unusable")]
    if passed_over:
        reason += "; not " + "; not ".join(f"{v.id}: {v.reason}" for v in passed_over[:SHOWN])
    return Choice(Decision(Outcome.FOUND, chosen, tuple(verdicts), reason), sources)


def _nothing(verdicts: list[Verdict], step: int | None) -> Decision:
    """Absent, or found and of no use."""
    known = [verdict for verdict in verdicts if verdict.verdict in ("incomplete", "unusable")]
    if known:
        told = "; ".join(f"{verdict.id}: {verdict.reason}" for verdict in known[:SHOWN])
        is_bad = any(verdict.verdict == "unusable" for verdict in known)
        outcome = Outcome.UNUSABLE if is_bad or _was_complete(known) else Outcome.ABSENT
        return Decision(outcome, None, tuple(verdicts), f"no snapshot can be made whole: {told}")
    if step is not None and verdicts:
        held = ", ".join(str(verdict.id) for verdict in verdicts[:SHOWN])
        return Decision(Outcome.ABSENT, None, tuple(verdicts), f"no snapshot of step {step}; there is {held}")
    return Decision(Outcome.ABSENT, None, tuple(verdicts), "the job has no snapshot")


def _was_complete(verdicts: Iterable[Verdict]) -> bool:
    """Shards were lost, not only never captured: to begin anew has to be asked for."""
    return any(GONE in verdict.reason or ALL_GONE in verdict.reason for verdict in verdicts)


def _facts(inventories: Iterable[Inventory], row_sets: Iterable[RowSet] = ()) -> dict[SnapshotId, _Facts]:
    found: dict[SnapshotId, _Facts] = {}
    for inventory in inventories:
        for held in inventory.held:
            known = found.setdefault(held.id, _Facts(held.world_size))
            known.nodes_of.setdefault(held.rank, set()).add(inventory.node)
    for row_set in row_sets:
        if row_set.world_size:
            found.setdefault(row_set.id, _Facts(row_set.world_size))
    return found


def _sources(
    snapshot: SnapshotId, facts: _Facts | None, situation: Situation, *, is_stored: bool
) -> tuple[tuple[Source, ...], str]:
    """(a source for each rank, "") or ((), what is lacking)."""
    if facts is None:
        return (), ALL_GONE
    sources: list[Source] = []
    lacking: list[str] = []
    row_sets = [row_set for row_set in situation.row_sets if row_set.id == snapshot]
    was_complete = situation.newest_known is not None and snapshot <= situation.newest_known
    for rank in range(facts.world_size):
        nodes = facts.nodes_of.get(rank)
        if nodes:
            sources.append(Source(rank, tuple(sorted(nodes))))
            continue
        source, why = _decodable(rank, row_sets, situation.inventories)
        if source is not None:
            sources.append(source)
        elif is_stored:
            sources.append(Source(rank, ()))
        else:
            missing = GONE if was_complete or row_sets else "it was captured nowhere that answers"
            lacking.append(f"rank {rank}: {missing}{why}")
    return tuple(sources), listed(lacking, separator="; ")


def _decodable(
    rank: int, row_sets: Sequence[RowSet], inventories: Sequence[Inventory]
) -> tuple[Source | None, str]:
    why = ""
    for row_set in sorted(row_sets, key=lambda rows: rows.epoch, reverse=True):
        covering = [row for row in row_set.rows if any(chunk.rank == rank for chunk in row.chunks)]
        if not covering:
            continue
        lack = missing_row(row_set, covering, inventories)
        if not lack:
            return Source(rank, (), row_set), ""
        why = why or f", and {lack}"
    return None, why


def missing_row(row_set: RowSet, rows: Iterable[Row], inventories: Sequence[Inventory]) -> str:
    """The first of `rows` that has too few fragments, in words; empty if each has at least k."""
    held = {
        (inventory.node, held.rank)
        for inventory in inventories
        for held in inventory.held
        if held.id == row_set.id
    }
    held_ranks = {rank for _, rank in held}
    parity = {
        inventory.node: frozenset[tuple[bytes, int]]().union(*(r.fragments for r in inventory.rows))
        for inventory in inventories
    }
    for row in rows:
        absent = row_set.code.k - len(row.chunks)
        data = sum(1 for chunk in row.chunks if chunk.rank in held_ranks)
        coded = sum((row.id, i) in parity.get(node, ()) for i, node in enumerate(row.parity_nodes))
        if absent + data + coded < row_set.code.k:
            have = (
                f"{data} of {len(row.chunks)} chunks and {coded} of {len(row.parity_nodes)} parity fragments"
            )
            gone = [node for node in row_set.nodes if node not in parity]
            lost = f"; lost: {listed(gone)}" if gone else ""
            return f"row {row.number} of group {row_set.group} has only {have}{lost}"
    return ""


def _how(sources: Sequence[Source]) -> str:
    coded = [source.rank for source in sources if source.row_set is not None]
    stored = [source.rank for source in sources if source.row_set is None and not source.nodes]
    if not coded and not stored:
        return "whole on living nodes"
    if len(stored) == len(sources):
        return "from the shared tier"
    parts = [f"ranks {listed(coded)} from parity"] if coded else []
    parts += [f"ranks {listed(stored)} from the shared tier"] if stored else []
    return f"{', '.join(parts)}, the others whole on living nodes"
