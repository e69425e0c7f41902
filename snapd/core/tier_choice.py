"""When a restore has to ask the shared tier, and what it makes of memory's answer and the tier's. Pure.

Whether the tier can hold something newer than memory's newest complete snapshot follows from facts that this daemon (or
its cluster) has itself. A generation is given out above everything that the tier had before (the floor); what the tier
has above the floor was complete in memory first; and memory gives a complete snapshot up only for a newer complete one.
So a snapshot of a generation above the floor, or one that the tier itself was seen to have as its newest, is the newest
there is, as long as nobody else has taken the job up meanwhile with a counter of his own: a job that moved to another
machine and came back. That cannot be so within moments of the last trainer's end here. Where only a daemon before this
one saw that end, the tier is asked for what it has, briefly, and not waited for. After longer it must be asked: an
older step is never taken because something could not be reached.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from snapd.core.ids import SnapshotId
from snapd.core.restore import Decision, Outcome, Verdict
from snapd.core.words import listed

TRUST_S = 120.0  # no other machine starts a world, trains and commits within it


class Ask(enum.Enum):
    """NOT: what memory has is the newest. BRIEFLY: it is by all that is known here, some of it at second hand. MUST:
    the tier may have what memory lacks.
    """

    NOT = "not"
    BRIEFLY = "briefly"
    MUST = "must"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFacts:
    """What is known here of the tier without asking it. `floor`: the highest generation that it had before the job
    began here, None: never learnt; `newest`: it was seen to have, or was given; `idle_s`: since the last trainer of an
    older generation was served by this daemon, None: not known; `noted_idle_s`: the same, as one before it has noted.
    """

    floor: int | None
    newest: SnapshotId | None
    idle_s: float | None
    noted_idle_s: float | None = None


def how_to_ask(memory: Decision, facts: TierFacts, *, step: int | None) -> tuple[Ask, str]:
    """Whether the tier is asked, and why.

    `memory`: what would be restored without a tier. `step`: the one that was asked for.
    """
    chosen = memory.chosen if memory.outcome in (Outcome.FOUND, Outcome.WORLD_SIZE_DIFFERS) else None
    if chosen is None:
        return Ask.MUST, "memory has nothing that could be restored"
    worse = [verdict for verdict in memory.verdicts if verdict.verdict == "unusable" and verdict.id > chosen]
    if worse:
        return Ask.MUST, f"{worse[0].id} is newer, and unusable in memory"
    if facts.newest is not None and facts.newest > chosen and step is None:
        return Ask.MUST, f"the tier has {facts.newest}, memory only {chosen}"
    if facts.floor is None:
        return Ask.MUST, "what the tier has of the job was never learnt"
    if chosen.generation <= facts.floor and chosen != facts.newest:
        return Ask.MUST, f"{chosen} was captured before this daemon knew what the tier has"
    if facts.idle_s is not None and facts.idle_s <= TRUST_S:
        return Ask.NOT, "the job was here until just now, and memory has its newest snapshot"
    if facts.noted_idle_s is not None and facts.noted_idle_s <= TRUST_S:
        return Ask.BRIEFLY, "the job was here until just now, as the daemon before this one has noted"
    return Ask.MUST, "the job may have been elsewhere meanwhile"


def merged(decision: Decision, found: Sequence[Verdict]) -> Decision:
    """Memory's decision with what was found in the tier: its verdicts come in where they belong by age. Those of the
    tier win, except that what memory has chosen stays chosen.
    """
    verdicts: dict[SnapshotId, Verdict] = {verdict.id: verdict for verdict in found}
    for verdict in decision.verdicts:
        known = verdicts.get(verdict.id)
        if known is None or verdict.verdict == "chosen":
            verdicts[verdict.id] = verdict
        elif known.verdict == "unusable" and verdict.verdict == "unusable":
            reason = f"in memory: {verdict.reason}; in the tier: {known.reason}"
            verdicts[verdict.id] = Verdict(verdict.id, "unusable", reason)
    ordered = tuple(verdicts[snapshot] for snapshot in sorted(verdicts, reverse=True))
    outcome, reason = decision.outcome, decision.reason
    bad = [verdict for verdict in ordered if verdict.verdict == "unusable"]
    if outcome in (Outcome.ABSENT, Outcome.UNUSABLE) and bad:
        told = "; ".join(f"{verdict.id}: {verdict.reason}" for verdict in bad)
        return Decision(Outcome.UNUSABLE, None, ordered, f"snapshots were found, none can be used: {told}")
    passed = [v for v in found if v.verdict == "unusable" and decision.chosen and v.id > decision.chosen]
    if outcome is Outcome.FOUND and passed:
        reason += "; not " + "; not ".join(f"{v.id}: {v.reason}" for v in passed[:8])
    return Decision(outcome, decision.chosen, ordered, reason)


def chosen_from_tier(
    snapshot: SnapshotId,
    where: str,
    memory: Decision,
    found: Sequence[Verdict],
    *,
    from_memory: Collection[int] = (),
    left_in_tier: int = 0,
) -> Decision:
    """The decision for a snapshot that was made whole from the tier; `left_in_tier`: see Decision."""
    how = f"from {where}" + (f", ranks {listed(sorted(from_memory))} from memory" if from_memory else "")
    verdicts = {verdict.id: verdict for verdict in memory.verdicts}
    verdicts |= {verdict.id: verdict for verdict in found}
    verdicts[snapshot] = Verdict(snapshot, "chosen", how)
    ordered = []
    for one in sorted(verdicts, reverse=True):
        verdict = verdicts[one]
        if one < snapshot and verdict.verdict == "chosen":
            verdict = Verdict(one, "older", f"{snapshot} is newer")
        ordered.append(verdict)
    reason = f"the newest snapshot that is good, {how}"
    passed = [v for v in ordered if v.verdict == "unusable" and v.id > snapshot]
    if passed:
        reason += "; not " + "; not ".join(f"{v.id}: {v.reason}" for v in passed[:8])
    return Decision(Outcome.FOUND, snapshot, tuple(ordered), reason, left_in_tier)


def unreachable(memory: Decision, found: Sequence[Verdict], where: str, why: str) -> Decision:
    """The tier may have what is needed, and cannot be asked for it."""
    verdicts: Mapping[SnapshotId, Verdict] = {v.id: v for v in (*memory.verdicts, *found)}
    ordered = tuple(verdicts[snapshot] for snapshot in sorted(verdicts, reverse=True))
    reason = f"{where} may have a newer snapshot and cannot be asked: {why}"
    return Decision(Outcome.UNREACHABLE, memory.chosen, ordered, reason)
