"""When a restore asks the tier, and what becomes of both answers."""

from __future__ import annotations

import pytest

from snapd.core.ids import SnapshotId
from snapd.core.recovery import Inventory, Situation, Stored, choose_among_nodes
from snapd.core.reports import Held
from snapd.core.restore import Decision, Outcome, Verdict
from snapd.core.tier_choice import (
    TRUST_S,
    Ask,
    TierFacts,
    chosen_from_tier,
    how_to_ask,
    merged,
    unreachable,
)


def sid(generation: int, step: int) -> SnapshotId:
    return SnapshotId(generation, step)


def found(snapshot: SnapshotId, *others: Verdict) -> Decision:
    verdicts = sorted([Verdict(snapshot, "chosen", ""), *others], key=lambda v: v.id, reverse=True)
    return Decision(Outcome.FOUND, snapshot, tuple(verdicts), "the newest")


NOTHING = Decision(Outcome.ABSENT, None, (), "the job has no snapshot")


def facts(
    floor: int | None = 0,
    newest: SnapshotId | None = None,
    idle_s: float | None = 1.0,
    noted_idle_s: float | None = None,
) -> TierFacts:
    return TierFacts(floor=floor, newest=newest, idle_s=idle_s, noted_idle_s=noted_idle_s)


@pytest.mark.parametrize(
    ("memory", "known", "expected"),
    [
        (found(sid(1, 10)), facts(), Ask.NOT),
        (found(sid(1, 10)), facts(newest=sid(1, 8)), Ask.NOT),
        (found(sid(1, 10)), facts(idle_s=TRUST_S + 1, noted_idle_s=TRUST_S + 5), Ask.MUST),
        (found(sid(1, 10)), facts(idle_s=None), Ask.MUST),
        (found(sid(1, 10)), facts(idle_s=None, noted_idle_s=9.0), Ask.BRIEFLY),
        (found(sid(1, 10)), facts(idle_s=None, noted_idle_s=TRUST_S + 1), Ask.MUST),
        (found(sid(1, 10)), facts(floor=None), Ask.MUST),
        (found(sid(1, 10)), facts(floor=1), Ask.MUST),
        (found(sid(1, 10)), facts(floor=1, newest=sid(1, 10)), Ask.NOT),  # it was brought from there
        (found(sid(1, 10)), facts(newest=sid(1, 12)), Ask.MUST),
        (found(sid(1, 10), Verdict(sid(1, 12), "unusable", "a bit")), facts(), Ask.MUST),
        (found(sid(1, 10), Verdict(sid(1, 12), "incomplete", "rank 1")), facts(), Ask.NOT),
        (NOTHING, facts(), Ask.MUST),
    ],
)
def test_the_tier_is_asked_when_it_may_have_what_memory_lacks(
    memory: Decision, known: TierFacts, expected: Ask
) -> None:
    assert how_to_ask(memory, known, step=None)[0] is expected


def test_a_step_that_was_asked_for_is_not_overruled_by_a_newer_one_in_the_tier() -> None:
    assert how_to_ask(found(sid(1, 10)), facts(newest=sid(1, 12)), step=10)[0] is Ask.NOT


def test_what_is_bad_in_the_tier_is_told_and_memory_stays_chosen() -> None:
    decision = merged(found(sid(1, 10)), [Verdict(sid(2, 5), "unusable", "pack p at byte 7")])
    assert (decision.outcome, decision.chosen) == (Outcome.FOUND, sid(1, 10))
    assert "pack p at byte 7" in decision.reason
    assert [v.id for v in decision.verdicts] == [sid(2, 5), sid(1, 10)]


def test_nothing_in_memory_and_all_bad_in_the_tier_is_unusable_not_absent() -> None:
    decision = merged(NOTHING, [Verdict(sid(1, 4), "unusable", "a"), Verdict(sid(1, 2), "unusable", "b")])
    assert decision.outcome is Outcome.UNUSABLE
    assert "1/4: a" in decision.reason and "1/2: b" in decision.reason
    assert merged(NOTHING, []).outcome is Outcome.ABSENT


def test_both_say_why_the_same_snapshot_is_bad() -> None:
    memory = Decision(Outcome.UNUSABLE, None, (Verdict(sid(1, 4), "unusable", "chunk 3"),), "")
    (verdict,) = merged(memory, [Verdict(sid(1, 4), "unusable", "pack gone")]).verdicts
    assert verdict.reason == "in memory: chunk 3; in the tier: pack gone"


def test_what_came_from_the_tier_says_so() -> None:
    decision = chosen_from_tier(sid(2, 8), "/tier", found(sid(1, 4)), [], from_memory=[1])
    assert decision.outcome is Outcome.FOUND
    assert [(v.id, v.verdict) for v in decision.verdicts] == [(sid(2, 8), "chosen"), (sid(1, 4), "older")]
    assert "from /tier" in decision.reason and "ranks 1 from memory" in decision.reason


def test_a_tier_that_is_away_is_named() -> None:
    decision = unreachable(NOTHING, [], "s3://b/p", "no answer")
    assert decision.outcome is Outcome.UNREACHABLE
    assert "s3://b/p" in decision.reason and "no answer" in decision.reason


# many nodes


def inventory(
    node: str, *held: tuple[SnapshotId, int], problems: tuple[tuple[SnapshotId, str], ...] = ()
) -> Inventory:
    return Inventory(
        node=node,
        held=tuple(Held(snapshot, rank, 2, 100) for snapshot, rank in held),
        problems=problems,
        is_here=True,
    )


def choice(inventories: list[Inventory], *stored: Stored, unreachable: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    return choose_among_nodes(
        Situation(inventories=inventories, unreachable=unreachable, world_size=2, stored=stored)
    )


def test_a_shard_that_no_node_has_comes_from_the_tier() -> None:
    nodes = [inventory("a", (sid(1, 4), 0), (sid(1, 2), 0), (sid(1, 2), 1))]
    assert choice(nodes).decision.chosen == sid(1, 2)
    both = choice(nodes, Stored(sid(1, 4), 2))
    assert both.decision.chosen == sid(1, 4)
    assert [(s.rank, s.nodes) for s in both.sources] == [(0, ("a",)), (1, ())]
    assert "ranks 1 from the shared tier" in next(
        v.reason for v in both.decision.verdicts if v.verdict == "chosen"
    )


def test_what_was_bad_on_nodes_is_taken_from_the_tier_alone() -> None:
    nodes = [inventory("a", (sid(1, 4), 0), (sid(1, 4), 1), problems=((sid(1, 4), "chunk 3"),))]
    assert choice(nodes).decision.outcome is Outcome.UNUSABLE
    mended = choice(nodes, Stored(sid(1, 4), 2))
    assert mended.decision.chosen == sid(1, 4)
    assert all(not source.nodes for source in mended.sources)
    bad = choice(nodes, Stored(sid(1, 4), 0, "pack gone"))
    assert bad.decision.outcome is Outcome.UNUSABLE
    assert "chunk 3; in the tier: pack gone" in bad.decision.reason


def test_a_node_that_does_not_answer_is_not_waited_for_when_the_tier_has_it() -> None:
    nodes = [inventory("a", (sid(1, 4), 0))]
    assert choice(nodes, unreachable=("b",)).decision.outcome is Outcome.UNREACHABLE
    assert choice(nodes, Stored(sid(1, 4), 2), unreachable=("b",)).decision.chosen == sid(1, 4)


def test_the_newest_good_one_of_the_tier_is_taken() -> None:
    decision = choice(
        [], Stored(sid(2, 8), 0, "cut off"), Stored(sid(2, 6), 2), Stored(sid(1, 2), 2)
    ).decision
    assert decision.chosen == sid(2, 6)
    assert "cut off" in decision.reason
