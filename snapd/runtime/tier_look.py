"""What a job's collector asks of the shared tier when the ranks of a world that spans nodes restore.

The tier is one more source: a snapshot that no nodes and no rows make whole may be there. It is asked by the same rule
as on one machine (core/tier_choice.py); how long it is waited for is the collector's own patience.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from snapd.core.ids import SnapshotId
from snapd.core.recovery import Choice, Situation, Stored, choose_among_nodes
from snapd.core.restore import Decision, Outcome
from snapd.core.tier_choice import Ask, TierFacts, how_to_ask, unreachable
from snapd.errors import ConflictError, SnapdError
from snapd.runtime.job import Job
from snapd.runtime.peers import WorldAsk
from snapd.runtime.tier_access import is_store_away
from snapd.runtime.tier_restoring import BRIEF_S, TierRestores
from snapd.tier.reading import Candidate, Opened

GOOD_MAX = 4  # the newest may turn out bad when it is read
WAIT_S = 5.0  # for one answer; the collector asks again as long as it waits for nodes


@dataclass(frozen=True, slots=True)
class Seen:
    """What the tier has that is newer than what the nodes have, down to the first that is good. `away`: it was needed
    and could not be asked, in words.
    """

    where: str
    stored: tuple[Stored, ...] = ()
    away: str = ""


class TierLook:
    """One per daemon that may be a collector."""

    def __init__(self, tier: TierRestores, job: Callable[[str], Job | None]) -> None:
        self._tier = tier
        self._job = job

    async def look(self, name: str, ask: WorldAsk, nodes: Decision) -> Seen:
        """`nodes`: what would be restored without a tier.

        Raises:
            ConflictError: kind `tier_generation`.
        """
        job, where = self._job(name), self._tier.url
        facts = self._tier.facts(job, ask.generation) if job is not None else _UNKNOWN
        how, _ = how_to_ask(nodes, facts, step=ask.step)
        if how is Ask.NOT:
            return Seen(where)
        try:
            candidates = await self._tier.listed(name, BRIEF_S if how is Ask.BRIEFLY else WAIT_S)
            if job is not None:
                self._tier.check_generation(job, candidates, ask.generation)
            return Seen(where, await self._stored(name, ask, nodes, candidates))
        except SnapdError as error:
            if isinstance(error, ConflictError) or not is_store_away(error):
                raise
            return Seen(where, away=error.message if how is Ask.MUST else "")

    async def _stored(
        self, name: str, ask: WorldAsk, nodes: Decision, candidates: list[Candidate]
    ) -> tuple[Stored, ...]:
        reader = await self._tier.reader(name)
        found: list[Stored] = []
        known = nodes.chosen if nodes.outcome is Outcome.FOUND else None
        for candidate in candidates:
            if known is not None and candidate.id <= known:
                break
            if ask.step is not None and candidate.id.step != ask.step:
                continue
            opened = await self._tier.ask(reader.open, candidate, None)
            if isinstance(opened, Opened):
                found.append(Stored(opened.id, opened.record.world_size))
                if sum(1 for one in found if not one.problem) == GOOD_MAX:
                    break
            elif not opened.is_void:
                found.append(Stored(candidate.id, 0, opened.reason))
        return tuple(found)


_UNKNOWN = TierFacts(floor=None, newest=None, idle_s=None)


async def with_tier(
    tier: TierLook | None,
    name: str,
    ask: WorldAsk,
    situation: Situation,
    bad: Mapping[SnapshotId, str],
) -> Choice:
    """The choice among nodes, and the tier if that may matter. `bad`: what was read from it and found bad."""
    choice = choose_among_nodes(situation)
    if tier is None:
        return choice
    seen = await tier.look(name, ask, choice.decision)
    if seen.away and not (ask.accept_older and choice.decision.outcome is Outcome.FOUND):
        decision = unreachable(choice.decision, (), seen.where, seen.away)
        return Choice(decision, (), (seen.where,))
    if not seen.stored:
        return choice
    stored = tuple(Stored(one.id, 0, bad[one.id]) if one.id in bad else one for one in seen.stored)
    return choose_among_nodes(replace(situation, stored=stored))
