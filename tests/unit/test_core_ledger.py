"""What may be dropped, and what may never be; what is restored, and what is answered when nothing can be."""

from __future__ import annotations

import pytest

from snapd.core.ids import Place, SnapshotId
from snapd.core.ledger import DROP_REASONS_KEPT, Ledger
from snapd.core.manifest import Chunk, ShardRecord
from snapd.core.restore import Outcome, RankReport, RestoreRound, choose
from snapd.errors import ConflictError, InvariantViolated


def record(generation: int, step: int, rank: int, world_size: int = 2) -> ShardRecord:
    return ShardRecord(
        job="j",
        id=SnapshotId(generation, step),
        rank=rank,
        world_size=world_size,
        chunk_bytes=64,
        layout_nbytes=1,
        early_values_offset=64,
        early_values_nbytes=0,
        chunks=(Chunk(1, bytes(16), Place(0, step)),),
        parent=None,
        captured_wall_time_s=0.0,
        digest=bytes(16),
    )


def ledger(*captured: tuple[int, int, int], world_size: int = 2, is_verified: bool = True) -> Ledger:
    found = Ledger()
    for generation, step, rank in captured:
        found.add(
            record(generation, step, rank, world_size),
            session_id=rank + 1,
            sequence=step,
            is_verified=is_verified,
        )
    return found


def doomed(found: Ledger, keep: int = 1, closed_below: int = 1) -> list[tuple[int, int]]:
    listed = found.to_drop(keep_complete=keep, closed_below=closed_below)
    assert all(reason for _, reason in listed)
    return [(snapshot.generation, snapshot.step) for snapshot, _ in listed]


def test_the_older_goes_only_when_the_newer_is_complete():
    found = ledger((1, 1, 0), (1, 1, 1), (1, 2, 0))
    assert found.newest_complete().id == SnapshotId(1, 1)
    assert doomed(found) == []
    found.add(record(1, 2, 1), session_id=2, sequence=2, is_verified=True)
    assert doomed(found) == [(1, 1)]
    assert doomed(found, keep=2) == []


def test_a_step_that_a_rank_went_past_is_dropped():
    found = ledger((1, 1, 0), (1, 1, 1), (1, 2, 0))
    found.passed(1, 1, 2)
    assert doomed(found) == [(1, 2)]
    assert "ranks 1 went on without it" in found.to_drop(keep_complete=1, closed_below=1)[0][1]


def test_an_incomplete_snapshot_of_a_generation_that_is_over_is_dropped():
    found = ledger((1, 1, 0), (1, 1, 1), (1, 2, 0))
    assert doomed(found, closed_below=2) == [(1, 2)]
    assert doomed(ledger((1, 1, 0)), closed_below=2) == [(1, 1)]


def test_the_newest_complete_of_an_older_generation_stays_until_the_newer_has_one():
    found = ledger((1, 9, 0), (1, 9, 1), (2, 3, 0))
    assert doomed(found, closed_below=2) == []
    found.add(record(2, 3, 1), session_id=2, sequence=1, is_verified=True)
    assert found.newest_complete().id == SnapshotId(2, 3)
    assert doomed(found, closed_below=2) == [(1, 9)]


def test_a_held_snapshot_stays_and_an_unusable_one_counts_for_nothing():
    found = ledger((1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1))
    found.hold(SnapshotId(1, 1))
    assert doomed(found) == []
    found.unhold(SnapshotId(1, 1))
    found.mark_unusable(SnapshotId(1, 2), "rank 0 chunk 3: hash differs")
    found.mark_unusable(SnapshotId(1, 2), "something else")
    assert found.snapshots[SnapshotId(1, 2)].problem == "rank 0 chunk 3: hash differs"
    assert found.newest_complete().id == SnapshotId(1, 1)
    assert doomed(found) == []
    found.add(record(1, 3, 0), session_id=1, sequence=3, is_verified=True)
    found.add(record(1, 3, 1), session_id=2, sequence=3, is_verified=True)
    assert doomed(found) == [(1, 1), (1, 2)]
    with pytest.raises(InvariantViolated):
        found.unhold(SnapshotId(1, 1))


def test_what_is_held_counts_among_those_that_stay():
    found = ledger(*((1, step, rank) for step in range(1, 5) for rank in range(2)))
    assert doomed(found, keep=2) == [(1, 1), (1, 2)]
    found.hold(SnapshotId(1, 1))  # being flushed
    assert doomed(found, keep=2) == [(1, 2), (1, 3)]
    assert doomed(found, keep=1) == [(1, 2), (1, 3)]  # the newest stays in any case
    found.unhold(SnapshotId(1, 1))
    found.hold(SnapshotId(1, 4))
    assert doomed(found, keep=2) == [(1, 1), (1, 2)]


def test_a_shard_is_recorded_once_and_in_one_world():
    found = ledger((1, 1, 0))
    for wrong in (record(1, 1, 0), record(1, 1, 1, world_size=3), record(1, 1, 2, world_size=2)):
        with pytest.raises(InvariantViolated):
            found.add(wrong, session_id=1, sequence=1, is_verified=True)
    assert list(found.snapshots[SnapshotId(1, 1)].shards) == [0]


def test_the_newest_shard_of_a_rank_or_session():
    found = ledger((1, 1, 0), (1, 2, 0), (1, 2, 1))
    assert found.newest_shard(0).record.id.step == 2
    assert found.newest_shard(0, session_id=9) is None
    assert found.newest_shard(5) is None
    found.mark_unusable(SnapshotId(1, 2), "bad")
    assert found.newest_shard(0).record.id.step == 1


def test_why_a_step_is_gone_is_remembered_for_a_while():
    found = ledger((1, 1, 0), (1, 1, 1))
    found.drop(SnapshotId(1, 1), "overtaken")
    assert found.dropped[SnapshotId(1, 1)].was_complete
    for step in range(2, DROP_REASONS_KEPT + 5):
        found.note_dropped(SnapshotId(1, step), "skipped")
    assert len(found.dropped) == DROP_REASONS_KEPT
    assert not found.dropped[SnapshotId(1, DROP_REASONS_KEPT)].was_complete


# restore


def decide(found: Ledger, world_size: int = 2, step: int | None = None):
    return choose(found.newest_first(), world_size=world_size, step=step)


def test_the_newest_complete_and_verified_is_chosen():
    found = ledger((1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1), (1, 3, 0))
    decision = decide(found)
    assert (decision.outcome, decision.chosen) == (Outcome.FOUND, SnapshotId(1, 2))
    assert [(v.id.step, v.verdict) for v in decision.verdicts] == [
        (3, "incomplete"),
        (2, "chosen"),
        (1, "older"),
    ]
    assert decision.verdicts[0].reason == "not captured by ranks 1"


def test_unverified_means_verify_first():
    found = ledger((1, 2, 0), (1, 2, 1), is_verified=False)
    assert decide(found).outcome is Outcome.VERIFY
    for shard in found.snapshots[SnapshotId(1, 2)].shards.values():
        shard.is_verified = True
    assert decide(found).outcome is Outcome.FOUND


def test_an_older_one_is_taken_only_when_the_newer_is_proved_bad():
    found = ledger((1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1))
    found.mark_unusable(SnapshotId(1, 2), "rank 1 chunk 0: hash differs")
    decision = decide(found)
    assert decision.chosen == SnapshotId(1, 1)
    assert "newer ones are unusable" in decision.reason
    found.mark_unusable(SnapshotId(1, 1), "gone")
    decision = decide(found)
    assert decision.outcome is Outcome.UNUSABLE
    assert "1/2: rank 1 chunk 0: hash differs; 1/1: gone" in decision.reason


def test_nothing_and_nothing_complete_are_absent():
    assert decide(Ledger()).outcome is Outcome.ABSENT
    decision = decide(ledger((1, 1, 0)))
    assert (decision.outcome, decision.reason) == (Outcome.ABSENT, "no snapshot is complete on all ranks")


def test_a_step_is_that_of_the_newest_generation():
    found = ledger((1, 5, 0), (1, 5, 1), (2, 5, 0), (2, 5, 1), (2, 6, 0), (2, 6, 1))
    assert decide(found, step=5).chosen == SnapshotId(2, 5)
    decision = decide(found, step=9)
    assert decision.outcome is Outcome.ABSENT and "there is 2/6, 2/5, 1/5" in decision.reason


def test_another_world_size_is_its_own_answer():
    decision = decide(ledger((1, 1, 0), (1, 1, 1)), world_size=4)
    assert (decision.outcome, decision.chosen) == (Outcome.WORLD_SIZE_DIFFERS, SnapshotId(1, 1))


def round_of(world_size: int = 2) -> RestoreRound:
    return RestoreRound(2, 0, world_size, None, decide(ledger((1, 1, 0), (1, 1, 1))))


def test_the_barrier_waits_for_all():
    found = round_of()
    found.report(0, RankReport(True))
    assert found.settle() is None
    found.report(1, RankReport(True))
    assert found.settle().is_committed
    found.report(1, RankReport(False, failure="too late to matter"))
    assert found.settle().is_committed


def test_the_barrier_says_who_failed():
    found = round_of()
    found.report(0, RankReport(True))
    found.report(1, RankReport(False, failure="names differ"))
    answer = found.settle()
    assert (answer.is_committed, answer.is_try_again) == (False, False)
    assert answer.reason == "not restored: rank 1: names differ"
    assert not answer.problem


def test_a_bad_chunk_means_another_round_once_all_have_reported():
    found = round_of()
    found.report(0, RankReport(False, bad_chunks=((1, 7, "hash differs"),)))
    assert found.settle() is None
    found.report(1, RankReport(True))
    answer = found.settle()
    assert (answer.is_committed, answer.is_try_again) == (False, True)
    assert answer.problem == "rank 1 chunk 7: hash differs (found by rank 0)"


@pytest.mark.parametrize(
    ("lost", "is_late", "text"), [({1}, False, "rank 1 is gone"), (set(), True, "in time: rank 1")]
)
def test_a_rank_that_never_reports(lost, is_late, text):
    found = round_of()
    found.report(0, RankReport(True))
    assert found.settle(lost_ranks={0}) is None
    answer = found.settle(lost_ranks=lost, is_late=is_late)
    assert not answer.is_committed and not answer.is_try_again and text in answer.reason
    assert found.settle() is answer


def test_ranks_of_a_round_ask_for_the_same_step():
    found = round_of()
    found.check_same(None)
    with pytest.raises(ConflictError):
        found.check_same(3)
